//! Owns deliveries: signs, sends, classifies, retries, records.
