//! SQL: one code base for SQLite and PostgreSQL, group commit, one function per question asked.
