//! The RunPod worker protocol, server side: what an unmodified handler image speaks.
