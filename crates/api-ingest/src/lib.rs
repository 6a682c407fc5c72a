//! HTTP in: validates, stores once, publishes, answers after the commit.
