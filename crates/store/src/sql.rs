//! Hot statements: raw SQL of a few fixed sizes, so that each is prepared once per connection.
//!
//! Placeholders in texts of one's own are `$1`, `$2`, … for both databases (sqlx reads them as numbers on SQLite too);
//! in lists they are rendered for each.

use std::{
    collections::HashMap,
    sync::{OnceLock, RwLock},
};

use sea_orm::{ConnectionTrait, DatabaseBackend, ExecResult, QueryResult, Statement, Value};

use crate::StoreError;

/// Most rows that one statement takes.
pub const MAX_ROWS: usize = 128;

/// A statement over a list of rows: `before` + `(…),(…)` + `after`.
///
/// `casts` has one entry per column: the PostgreSQL type the first row's parameters are cast to, or `""`. Casts are
/// needed wherever the list is not the direct source of an INSERT.
#[derive(Debug)]
pub struct Rows {
    /// Name, unique in the program: the key of the statement's cache.
    pub name: &'static str,
    /// Text before the list.
    pub before: &'static str,
    /// One entry per column.
    pub casts: &'static [&'static str],
    /// Text after the list.
    pub after: &'static str,
}

/// Rendered statements by name, number of rows and database.
type Texts = RwLock<HashMap<(&'static str, usize, bool), String>>;

/// A value list `$1, $2, …` for `IN (…)`.
pub const LIST: &[&str] = &[""];

impl Rows {
    /// Runs the statement over all rows, split into statements of few sizes. `row` appends one row's values. Answers
    /// the number of rows affected.
    pub async fn execute<C: ConnectionTrait, T>(
        &self,
        conn: &C,
        rows: &[T],
        row: impl Fn(&T, &mut Vec<Value>),
    ) -> Result<u64, StoreError> {
        let mut affected = 0;
        let split = self.split(conn.get_database_backend());
        for (part, size) in parts(rows, split) {
            let result: ExecResult = conn.execute_raw(self.statement(conn, part, size, &row)).await?;
            affected += result.rows_affected();
        }
        Ok(affected)
    }

    /// Runs this statement over `rows` and then `second` over the same rows: in one trip each time on SQLite.
    pub async fn execute_both<C: ConnectionTrait, T>(
        &self,
        second: &Self,
        conn: &C,
        rows: &[T],
        row: impl Fn(&T, &mut Vec<Value>),
        second_row: impl Fn(&T, &mut Vec<Value>),
    ) -> Result<(), StoreError> {
        let backend = conn.get_database_backend();
        let split = self.split(backend);
        if backend != DatabaseBackend::Sqlite || split != second.split(backend) {
            self.execute(conn, rows, row).await?;
            second.execute(conn, rows, second_row).await?;
            return Ok(());
        }
        for (part, size) in parts(rows, split) {
            let mut values = self.values(part, size, &row);
            values.append(&mut second.values(part, size, &second_row));
            let text = format!("{};{}", self.text(size, backend), second.text(size, backend));
            conn.execute_raw(Statement::from_sql_and_values(backend, text, values)).await?;
        }
        Ok(())
    }

    /// Like [`Self::execute`] for statements that answer rows.
    pub async fn query<C: ConnectionTrait, T>(
        &self,
        conn: &C,
        rows: &[T],
        row: impl Fn(&T, &mut Vec<Value>),
    ) -> Result<Vec<QueryResult>, StoreError> {
        let mut all = Vec::with_capacity(rows.len());
        let split = self.split(conn.get_database_backend());
        for (part, size) in parts(rows, split) {
            all.extend(conn.query_all_raw(self.statement(conn, part, size, &row)).await?);
        }
        Ok(all)
    }

    fn statement<C: ConnectionTrait, T>(
        &self,
        conn: &C,
        rows: &[T],
        size: usize,
        row: impl Fn(&T, &mut Vec<Value>),
    ) -> Statement {
        let backend = conn.get_database_backend();
        Statement::from_sql_and_values(backend, self.text(size, backend), self.values(rows, size, row))
    }

    /// The values of `rows`, filled up with nulls to `size` rows.
    fn values<T>(&self, rows: &[T], size: usize, row: impl Fn(&T, &mut Vec<Value>)) -> Vec<Value> {
        let mut values = Vec::with_capacity(size * self.casts.len());
        for r in rows {
            row(r, &mut values);
        }
        debug_assert_eq!(
            values.len(),
            rows.len() * self.casts.len(),
            "{}: columns and values differ",
            self.name
        );
        values.resize(size * self.casts.len(), Value::BigInt(None));
        values
    }

    /// Each statement is a trip to SQLite's thread and back, which costs more than a few values more.
    fn split(&self, backend: DatabaseBackend) -> Split {
        match (backend, self.before.starts_with("INSERT")) {
            // A key that is null equals none, so rows of nulls change nothing; inserts leave them out by name.
            (DatabaseBackend::Sqlite, false) => Split::Padded,
            (DatabaseBackend::Sqlite, true) if self.filtered().is_some() => Split::Padded,
            (DatabaseBackend::Sqlite, true) => Split::Fours,
            // A prepared statement of PostgreSQL is memory in each of its processes, and nulls have no type there.
            _ => Split::Halves,
        }
    }

    /// The head of an insert whose rows of nulls can be left out: the first column of each is part of its key.
    fn filtered(&self) -> Option<&'static str> {
        let head = self.before.strip_suffix("VALUES ")?;
        (head.starts_with("INSERT") && !head.contains("SELECT")).then_some(head)
    }

    fn text(&self, rows: usize, backend: DatabaseBackend) -> String {
        static CACHE: OnceLock<Texts> = OnceLock::new();
        let pg = backend == DatabaseBackend::Postgres;
        let cache = CACHE.get_or_init(RwLock::default);
        let key = (self.name, rows, pg);
        if let Ok(known) = cache.read()
            && let Some(text) = known.get(&key)
        {
            return text.clone();
        }
        let text = self.render(rows, pg);
        if let Ok(mut known) = cache.write() {
            known.insert(key, text.clone());
        }
        text
    }

    fn render(&self, rows: usize, pg: bool) -> String {
        use std::fmt::Write as _;
        let single = std::ptr::eq(self.casts, LIST) || self.casts == LIST;
        let filtered = self.filtered().filter(|_| !pg);
        let mut text = String::from(filtered.unwrap_or(self.before));
        if filtered.is_some() {
            text.push_str("SELECT * FROM (VALUES ");
        }
        let mut n = 0;
        for r in 0..rows {
            if r > 0 {
                text.push(',');
            }
            if !single {
                text.push('(');
            }
            for (c, cast) in self.casts.iter().enumerate() {
                n += 1;
                if c > 0 {
                    text.push(',');
                }
                if pg {
                    // Writing to a String cannot fail.
                    let _ = write!(text, "${n}");
                } else {
                    // SQLite looks a numbered placeholder's name up by walking all of them, once per value: with 64
                    // rows of ten columns that is most of the time of the whole process.
                    text.push('?');
                }
                if pg && r == 0 && !cast.is_empty() {
                    let _ = write!(text, "::{cast}");
                }
            }
            if !single {
                text.push(')');
            }
        }
        if filtered.is_some() {
            text.push_str(") WHERE column1 IS NOT NULL");
        }
        text.push_str(self.after);
        text
    }
}

/// How a list becomes statements, besides those of [`MAX_ROWS`] rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// Powers of two: few sizes.
    Halves,
    /// A multiple of four, then the rest.
    Fours,
    /// Powers of two, at most two of them: the last may have more places than rows.
    Padded,
}

impl Split {
    /// Rows of the next statement and its size, for at least one row that is left.
    fn next(self, left: usize) -> (usize, usize) {
        if left >= MAX_ROWS {
            return (MAX_ROWS, MAX_ROWS);
        }
        let below = 1 << left.ilog2();
        match self {
            Self::Fours if left >= 4 => (left - left % 4, left - left % 4),
            Self::Fours => (left, left),
            // Three eighths of the places may stay empty; a list with fewer rows is split first.
            Self::Padded if left - below > below / 4 || below <= 8 => (left, left.next_power_of_two()),
            Self::Halves | Self::Padded => (below, below),
        }
    }
}

fn parts<T>(mut rows: &[T], split: Split) -> impl Iterator<Item = (&[T], usize)> {
    std::iter::from_fn(move || {
        if rows.is_empty() {
            return None;
        }
        let (n, size) = split.next(rows.len());
        let (head, tail) = rows.split_at(n);
        rows = tail;
        Some((head, size))
    })
}

/// One statement with its values.
pub fn statement<C: ConnectionTrait>(
    conn: &C,
    sql: &str,
    values: impl IntoIterator<Item = Value>,
) -> Statement {
    Statement::from_sql_and_values(conn.get_database_backend(), sql, values)
}

/// Runs one statement; answers the rows affected.
pub async fn execute<C: ConnectionTrait>(
    conn: &C,
    sql: &str,
    values: impl IntoIterator<Item = Value>,
) -> Result<u64, StoreError> {
    Ok(conn.execute_raw(statement(conn, sql, values)).await?.rows_affected())
}

/// All rows of one query.
pub async fn query<C: ConnectionTrait>(
    conn: &C,
    sql: &str,
    values: impl IntoIterator<Item = Value>,
) -> Result<Vec<QueryResult>, StoreError> {
    Ok(conn.query_all_raw(statement(conn, sql, values)).await?)
}

/// The first row of one query.
pub async fn query_one<C: ConnectionTrait>(
    conn: &C,
    sql: &str,
    values: impl IntoIterator<Item = Value>,
) -> Result<Option<QueryResult>, StoreError> {
    Ok(conn.query_one_raw(statement(conn, sql, values)).await?)
}

/// An id as a value.
#[must_use]
pub fn id(bytes: &[u8; 16]) -> Value {
    Value::from(bytes.to_vec())
}

/// An unsigned number as a 64-bit value; what does not fit is the largest.
pub fn int(n: impl TryInto<i64>) -> Value {
    Value::from(n.try_into().unwrap_or(i64::MAX))
}

/// An optional unsigned number.
pub fn opt_int<N: TryInto<i64>>(n: Option<N>) -> Value {
    Value::BigInt(n.map(|n| n.try_into().unwrap_or(i64::MAX)))
}

/// Reads a column as u32; what does not fit is corrupt.
pub fn get_u32(row: &QueryResult, index: usize, what: &'static str) -> Result<u32, StoreError> {
    u32::try_from(row.try_get_by_index::<i64>(index)?).map_err(|_| StoreError::corrupt(what))
}

/// Reads a column as u64; what does not fit is corrupt.
pub fn get_u64(row: &QueryResult, index: usize, what: &'static str) -> Result<u64, StoreError> {
    u64::try_from(row.try_get_by_index::<i64>(index)?).map_err(|_| StoreError::corrupt(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_split_into_few_sizes_and_lose_none() {
        for n in 0..200_usize {
            let rows: Vec<usize> = (0..n).collect();
            for (kind, most) in [(Split::Halves, 7), (Split::Fours, 2), (Split::Padded, 2)] {
                let split: Vec<(&[usize], usize)> = parts(&rows, kind).collect();
                assert_eq!(split.iter().flat_map(|(part, _)| part.iter().copied()).collect::<Vec<_>>(), rows);
                assert!(split.iter().all(|(part, size)| part.len() <= *size && *size <= MAX_ROWS));
                assert!(kind == Split::Padded || split.iter().all(|(part, size)| part.len() == *size));
                let small = split.iter().filter(|(_, size)| *size < MAX_ROWS).count();
                assert!(small <= most, "{n} rows take {small} statements");
            }
        }
    }

    #[test]
    fn statements_come_in_few_sizes() {
        let sizes = |split: Split| {
            (1..=200).map(|n| split.next(n).1).collect::<std::collections::BTreeSet<_>>().len()
        };
        assert_eq!((sizes(Split::Halves), sizes(Split::Fours), sizes(Split::Padded)), (8, 35, 8));
    }

    #[test]
    fn text_numbers_every_value_and_casts_the_first_row() {
        let r = Rows { name: "t", before: "X ", casts: &["bytea", ""], after: " Y" };
        assert_eq!(r.render(2, true), "X ($1::bytea,$2),($3,$4) Y");
        assert_eq!(r.render(1, false), "X (?,?) Y");
        let insert =
            Rows { name: "i", before: "INSERT INTO t (a,b) VALUES ", casts: &["", ""], after: " ON" };
        let filtered = "INSERT INTO t (a,b) SELECT * FROM (VALUES (?,?),(?,?)) WHERE column1 IS NOT NULL ON";
        assert_eq!(insert.render(2, false), filtered);
        assert_eq!(insert.render(2, true), "INSERT INTO t (a,b) VALUES ($1,$2),($3,$4) ON");
        let l = Rows { name: "l", before: "IN (", casts: LIST, after: ")" };
        assert_eq!(l.render(3, true), "IN ($1,$2,$3)");
    }
}
