//! Partitions by day of received_at, made ahead and on demand.
//!
//! They are made before the write's transaction, because making one takes locks that should not be held
//! while rows are copied.

use super::copy::CopyRow;
use crate::error::{self, Engine};
use crate::migrate::LOCK_SQL;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use throughline_model::time::Timestamp;
use throughline_runtime::ports::Failure;

const DAY_US: i64 = 86_400_000_000;
/// Partitions made ahead: a weekend on which nothing could be made, and a day.
const DAYS_AHEAD: i64 = 3;
/// Wait before a failed attempt to make partitions ahead is repeated; each may wait for a lock.
const AHEAD_RETRY: Duration = Duration::from_secs(300);
/// Older days than this, and days beyond those made ahead, go to the DEFAULT partition, so that strange
/// times cannot make partitions without bound.
const DAYS_BACK: i64 = 400;

/// The days for which partitions are known to be, counted from 1970-01-01.
#[derive(Debug, Default)]
pub(crate) struct Partitions {
    reading: HashSet<i64>,
    session: HashSet<i64>,
    ahead_until: i64,
    ahead_again: Option<Instant>,
}

impl Partitions {
    /// Makes the partitions of the coming days where the day has turned since the last call. A lock that a
    /// long query holds must not stop today's rows: then it is tried again later.
    ///
    /// # Errors
    /// [`Failure::Stop`]: the right to make tables is missing, say.
    pub(crate) async fn make_ahead(&mut self, connection: &mut PgConnection) -> Result<(), Failure> {
        let until = today() + DAYS_AHEAD;
        if self.ahead_until >= until || self.ahead_again.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        for day in today()..=until {
            let made = match make_partition(connection, "reading", day, &mut self.reading).await {
                Ok(()) => make_partition(connection, "session", day, &mut self.session).await,
                error => error,
            };
            match made {
                Ok(()) => {}
                Err(error @ Failure::Dependency { .. }) => {
                    tracing::warn!(%error, "cannot make the coming days' partitions now, trying again later");
                    self.ahead_again = Some(Instant::now() + AHEAD_RETRY);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        self.ahead_until = until;
        Ok(())
    }

    /// Makes the partitions that the rows of a write need.
    pub(crate) async fn make_for<R: CopyRow>(
        &mut self,
        connection: &mut PgConnection,
        table: &'static str,
        rows: &[R],
    ) -> Result<(), Failure> {
        let known = if table == "reading" { &mut self.reading } else { &mut self.session };
        let allowed = today() - DAYS_BACK..=today() + DAYS_AHEAD;
        let mut last = None;
        for row in rows {
            let day = day_of(row.received_at());
            if last == Some(day) {
                continue;
            }
            last = Some(day);
            if !known.contains(&day) && allowed.contains(&day) {
                make_partition(connection, table, day, known).await?;
            }
        }
        Ok(())
    }
}

/// Makes one partition unless it exists.
///
/// It is made as a table of its own and then attached: `CREATE TABLE … PARTITION OF` would lock the whole
/// table against readers, ATTACH locks only the DEFAULT partition.
async fn make_partition(
    connection: &mut PgConnection,
    table: &str,
    day: i64,
    known: &mut HashSet<i64>,
) -> Result<(), Failure> {
    if known.contains(&day) {
        return Ok(());
    }
    let fail = |e| error::failure(Engine::Postgres, "make a partition", &e);
    let (name, from, to) = (partition_name(table, day), date_of(day), date_of(day + 1));
    let mut tx = connection.begin().await.map_err(fail)?;
    sqlx::raw_sql(LOCK_SQL).execute(&mut *tx).await.map_err(fail)?;
    let exists: bool = sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL")
        .bind(&name)
        .fetch_one(&mut *tx)
        .await
        .map_err(fail)?;
    if exists {
        tx.rollback().await.map_err(fail)?;
        known.insert(day);
        return Ok(());
    }
    let sql = format!(
        "CREATE TABLE {name} (LIKE {table} INCLUDING ALL); \
         ALTER TABLE {table} ATTACH PARTITION {name} \
         FOR VALUES FROM ('{from} 00:00:00+00') TO ('{to} 00:00:00+00')"
    );
    // Names and dates are made here from a number: nothing in the statement comes from outside.
    match sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *tx).await {
        Ok(_) => tx.commit().await.map_err(fail)?,
        Err(e) if is_in_default(&e) => {
            tx.rollback().await.map_err(fail)?;
            tracing::warn!(
                table,
                day = %from,
                "the DEFAULT partition already has rows of this day, so the day stays there; move them by hand"
            );
        }
        Err(e) => return Err(fail(e)),
    }
    known.insert(day);
    Ok(())
}

/// Says whether ATTACH was refused because the DEFAULT partition has rows of the day.
fn is_in_default(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|e| e.code()).is_some_and(|code| code == "23514")
}

fn partition_name(table: &str, day: i64) -> String {
    format!("{table}_{}", date_of(day).replace('-', ""))
}

/// Writes a day as `YYYY-MM-DD`.
fn date_of(day: i64) -> String {
    let text = Timestamp(day * DAY_US).to_string();
    text.split('T').next().unwrap_or_default().to_owned()
}

fn day_of(time: Timestamp) -> i64 {
    time.0.div_euclid(DAY_US)
}

fn today() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs() / 86_400).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_ends_at_midnight_utc_also_before_1970() {
        assert_eq!(
            (day_of(Timestamp(DAY_US - 1)), day_of(Timestamp(DAY_US)), day_of(Timestamp(-1))),
            (0, 1, -1)
        );
        assert_eq!(partition_name("reading", 20_484), "reading_20260131");
        assert_eq!((date_of(-1), date_of(0)), ("1969-12-31".to_owned(), "1970-01-01".to_owned()));
    }
}
