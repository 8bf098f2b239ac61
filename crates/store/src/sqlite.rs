//! SQLite: one file in WAL mode, one writer at a time, rows in multi-row inserts.

use crate::error::{self, Engine};
use crate::read::{self, OffsetTuple, SessionTuple, Table, TwinTuple};
use crate::{Step, StoredOffset, Write, fenced, migrate};
use sqlx::sqlite::{SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Arguments, AssertSqlSafe, ConnectOptions, Connection, SqliteConnection};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use throughline_model::rows::{AlertRow, ReadingRow, SessionRow, TwinRow};
use throughline_runtime::ports::Failure;

/// Rows of the largest insert, a power of two. 14 columns by 128 rows are 1,792 parameters, well below
/// SQLite's default bound of 32,766, and enough to make a statement's fixed cost (a hop to the connection's
/// thread and back) small beside its rows.
const ROWS_PER_INSERT_MAX: usize = 128;

const MOVE_OFFSET: &str = "UPDATE stage_offset SET next = ?, books = ?, \
       updated_at = CAST(unixepoch('subsec') * 1000000 AS INTEGER) \
     WHERE cluster_id = ? AND consumer_group = ? AND topic = ? AND partition = ? AND topic_id = ? AND next = ?";

const BEAR_OFFSET: &str = "INSERT INTO stage_offset \
       (next, books, cluster_id, consumer_group, topic, partition, topic_id) VALUES (?, ?, ?, ?, ?, ?, ?) \
     ON CONFLICT DO NOTHING";

const ADOPT_OFFSET: &str = "INSERT INTO stage_offset \
       (next, books, cluster_id, consumer_group, topic, partition, topic_id) VALUES (?, ?, ?, ?, ?, ?, ?) \
     ON CONFLICT (consumer_group, topic, partition) DO UPDATE SET cluster_id = excluded.cluster_id, \
       topic_id = excluded.topic_id, next = excluded.next, books = excluded.books, \
       updated_at = CAST(unixepoch('subsec') * 1000000 AS INTEGER)";

const OFFSETS: &str = "SELECT topic, partition, cluster_id, topic_id, next, books FROM stage_offset \
     WHERE consumer_group = ? ORDER BY topic, partition";

const TWIN: &str = "SELECT site_id, device_id, reported_version, desired_version, presence, last_seen_at, \
       document, message_id, trace_id FROM twin_data WHERE site_id = ? AND device_id = ?";

const TWINS: &str = "SELECT site_id, device_id, reported_version, desired_version, presence, last_seen_at, \
       document, message_id, trace_id FROM twin_data \
     WHERE (site_id, device_id) > (?2, ?3) AND (?1 IS NULL OR site_id = ?1) \
     ORDER BY site_id, device_id LIMIT ?4";

/// Replaces a twin, unless the row it meets is newer (`TwinRow::is_older_than`).
const KEEP_NEWER_TWIN: &str = " ON CONFLICT (site_id, device_id) DO UPDATE SET \
       reported_version = excluded.reported_version, desired_version = excluded.desired_version, \
       presence = excluded.presence, last_seen_at = excluded.last_seen_at, document = excluded.document, \
       message_id = excluded.message_id, trace_id = excluded.trace_id \
     WHERE excluded.last_seen_at > twin_data.last_seen_at OR (excluded.last_seen_at = twin_data.last_seen_at \
       AND excluded.reported_version >= twin_data.reported_version \
       AND excluded.desired_version >= twin_data.desired_version)";

const REMOVE_TWIN: &str = "DELETE FROM twin_data WHERE site_id = ? AND device_id = ?";

const LAST_SESSION: &str = "SELECT site_id, device_id, client_id, event, cause, protocol, session_generation, \
       occurred_at, received_at, message_id, trace_id FROM session_data \
     WHERE site_id = ? AND device_id = ? ORDER BY received_at DESC, message_id DESC LIMIT 1";

/// A SQLite store.
pub(crate) struct Sqlite {
    options: SqliteConnectOptions,
    /// Absent after an error that leaves its state unknown; the next call opens the file again.
    connection: Option<SqliteConnection>,
    readings: Inserts,
    sessions: Inserts,
    alerts: Inserts,
    twins: Inserts,
}

impl Sqlite {
    pub(crate) async fn open(url: &str, call_timeout: Duration) -> Result<Self, Failure> {
        let options = SqliteConnectOptions::from_str(url).map_err(|e| Failure::Stop {
            code: error::URL,
            message: format!("cannot read the SQLite URL: {e}"),
        })?;
        let options = options
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // At a commit every batch FULL costs no more than NORMAL, and NORMAL can lose the last commits
            // to a power cut, after which the mirrored offsets in Kafka would run ahead of the rows.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(call_timeout / 3)
            .disable_statement_logging();
        let mut store = Self {
            options,
            connection: None,
            readings: Inserts::new("INSERT INTO reading_data VALUES ", 14, ""),
            sessions: Inserts::new("INSERT INTO session_data VALUES ", 11, ""),
            alerts: Inserts::new(
                "INSERT INTO alert_data VALUES ",
                13,
                " ON CONFLICT (alert_id) DO UPDATE SET state = excluded.state, \
                   cleared_at = excluded.cleared_at \
                 WHERE alert_data.cleared_at IS NULL AND excluded.cleared_at IS NOT NULL",
            ),
            twins: Inserts::new("INSERT INTO twin_data VALUES ", 9, KEEP_NEWER_TWIN),
        };
        // Turning WAL on needs the file alone, and SQLite does not wait for that by itself.
        let give_up = Instant::now() + call_timeout;
        let connection = loop {
            match store.open_file().await {
                Ok(connection) => break connection,
                Err(Failure::Dependency { .. }) if Instant::now() < give_up && store.is_there() => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => return Err(error),
            }
        };
        store.connection = Some(connection);
        Ok(store)
    }

    pub(crate) async fn write(&mut self, write: &Write<'_>) -> Result<(), Failure> {
        let mut connection = self.take_connection().await?;
        self.transact(&mut connection, write).await?;
        self.connection = Some(connection);
        Ok(())
    }

    /// Runs the transaction of one write. IMMEDIATE takes the write lock first, so the offsets that the
    /// first statements compare cannot change afterwards.
    async fn transact(&self, connection: &mut SqliteConnection, write: &Write<'_>) -> Result<(), Failure> {
        let begun = connection.begin_with("BEGIN IMMEDIATE").await;
        let mut tx = begun.map_err(|e| fail("begin a transaction", &e))?;
        for (sql, steps) in [(MOVE_OFFSET, &write.moves), (BEAR_OFFSET, &write.births)] {
            for step in steps {
                let changed = change_offset(&mut tx, sql, write, step).await;
                if changed.map_err(|e| fail("move an offset", &e))? != 1 {
                    return Err(fenced(write));
                }
            }
        }
        let mut shared = SharedTexts::default();
        self.readings
            .run(&mut tx, write.readings, |row, values| bind_reading(row, values, &mut shared))
            .await
            .map_err(|e| fail("write readings", &e))?;
        self.sessions
            .run(&mut tx, write.sessions, bind_session)
            .await
            .map_err(|e| fail("write sessions", &e))?;
        self.alerts.run(&mut tx, &write.alerts, bind_alert).await.map_err(|e| fail("write alerts", &e))?;
        for twin in &write.twins.removals {
            let removal = sqlx::query(REMOVE_TWIN).bind(&twin.site_id).bind(&twin.device_id);
            removal.execute(&mut *tx).await.map_err(|e| fail("remove a twin", &e))?;
        }
        self.twins
            .run(&mut tx, &write.twins.puts, |row, values| bind_twin(row, values))
            .await
            .map_err(|e| fail("write twins", &e))?;
        tx.commit().await.map_err(|e| fail("commit (it may have happened)", &e))
    }

    pub(crate) async fn adopt(&mut self, group: &str, cluster_id: &str, step: &Step) -> Result<(), Failure> {
        self.with("adopt an offset", async |connection| {
            sqlx::query(ADOPT_OFFSET)
                .bind(step.to)
                .bind(&step.books)
                .bind(cluster_id)
                .bind(group)
                .bind(&step.topic)
                .bind(step.partition)
                .bind(&step.topic_id)
                .execute(connection)
                .await
        })
        .await?;
        Ok(())
    }

    pub(crate) async fn offsets(&mut self, group: &str) -> Result<Vec<StoredOffset>, Failure> {
        let rows: Vec<OffsetTuple> = self
            .with("read offsets", async |connection| {
                sqlx::query_as(OFFSETS).bind(group).fetch_all(connection).await
            })
            .await?;
        Ok(rows.into_iter().map(read::offset_from).collect())
    }

    pub(crate) async fn twin(&mut self, site_id: &str, device_id: &str) -> Result<Option<TwinRow>, Failure> {
        let row: Option<TwinTuple> = self
            .with("read a twin", async |connection| {
                sqlx::query_as(TWIN).bind(site_id).bind(device_id).fetch_optional(connection).await
            })
            .await?;
        Ok(row.map(read::twin_from))
    }

    pub(crate) async fn twins(
        &mut self,
        site_id: Option<&str>,
        after: (&str, &str),
        limit: u32,
    ) -> Result<Vec<TwinRow>, Failure> {
        let rows: Vec<TwinTuple> = self
            .with("read twins", async |connection| {
                let query = sqlx::query_as(TWINS).bind(site_id).bind(after.0).bind(after.1);
                query.bind(limit).fetch_all(connection).await
            })
            .await?;
        Ok(rows.into_iter().map(read::twin_from).collect())
    }

    pub(crate) async fn last_session(
        &mut self,
        site_id: &str,
        device_id: &str,
    ) -> Result<Option<SessionRow>, Failure> {
        let row: Option<SessionTuple> = self
            .with("read a session", async |connection| {
                sqlx::query_as(LAST_SESSION).bind(site_id).bind(device_id).fetch_optional(connection).await
            })
            .await?;
        Ok(row.map(read::session_from))
    }

    pub(crate) async fn count(&mut self, table: Table) -> Result<i64, Failure> {
        self.with("count rows", async |connection| {
            sqlx::query_scalar(table.count_sql()).fetch_one(connection).await
        })
        .await
    }

    pub(crate) async fn version(&mut self) -> Result<String, Failure> {
        self.with("ask for the version", async |connection| {
            sqlx::query_scalar("SELECT 'SQLite ' || sqlite_version()").fetch_one(connection).await
        })
        .await
    }

    async fn with<T>(
        &mut self,
        doing: &str,
        work: impl AsyncFnOnce(&mut SqliteConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Failure> {
        let mut connection = self.take_connection().await?;
        let value = work(&mut connection).await.map_err(|e| fail(doing, &e))?;
        self.connection = Some(connection);
        Ok(value)
    }

    /// Takes the connection out: it comes back only after success, and is closed after any error.
    async fn take_connection(&mut self) -> Result<SqliteConnection, Failure> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => self.open_file().await,
        }
    }

    /// Opens the file and migrates it: it may have been removed or replaced since.
    async fn open_file(&self) -> Result<SqliteConnection, Failure> {
        let doing = format!("open {}", self.options.get_filename().display());
        let mut connection = self.options.connect().await.map_err(|e| fail(&doing, &e))?;
        migrate::sqlite(&mut connection).await?;
        Ok(connection)
    }

    fn is_there(&self) -> bool {
        self.options.get_filename().exists()
    }
}

async fn change_offset(
    connection: &mut SqliteConnection,
    sql: &'static str,
    write: &Write<'_>,
    step: &Step,
) -> Result<u64, sqlx::Error> {
    let query = sqlx::query(sql)
        .bind(step.to)
        .bind(&step.books)
        .bind(write.cluster_id)
        .bind(write.group)
        .bind(&step.topic)
        .bind(step.partition)
        .bind(&step.topic_id);
    // The statement that inserts has no eighth parameter; SQLite ignores what is not asked for.
    Ok(query.bind(step.from).execute(connection).await?.rows_affected())
}

/// Multi-row inserts of one table, by number of rows: 1, 2, 4 … [`ROWS_PER_INSERT_MAX`]. Few statements
/// serve every number of rows, so that all stay prepared.
struct Inserts {
    statements: Vec<Arc<str>>,
}

impl Inserts {
    fn new(head: &str, columns: usize, tail: &str) -> Self {
        let row = format!("({})", vec!["?"; columns].join(","));
        let sizes = (0..=ROWS_PER_INSERT_MAX.ilog2()).map(|log| 1_usize << log);
        let statements =
            sizes.map(|size| format!("{head}{}{tail}", vec![row.as_str(); size].join(",")).into()).collect();
        Self { statements }
    }

    /// Inserts `rows` in order.
    async fn run<R>(
        &self,
        connection: &mut SqliteConnection,
        rows: &[R],
        mut bind: impl FnMut(&R, &mut Values),
    ) -> Result<(), sqlx::Error> {
        let mut rest = rows;
        while !rest.is_empty() {
            let log = rest.len().min(ROWS_PER_INSERT_MAX).ilog2() as usize;
            let (chunk, after) = rest.split_at(1 << log);
            let mut values = Values::default();
            for row in chunk {
                bind(row, &mut values);
            }
            let sql = AssertSqlSafe(Arc::clone(&self.statements[log]));
            sqlx::query_with(sql, values.0).execute(&mut *connection).await?;
            rest = after;
        }
        Ok(())
    }
}

/// The parameters of one insert.
#[derive(Default)]
struct Values(SqliteArguments);

impl Values {
    fn add<'v>(
        &mut self,
        value: impl sqlx::Encode<'v, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
    ) -> &mut Self {
        self.0.add(value).expect("texts and numbers always encode for SQLite");
        self
    }
}

/// Texts that neighbouring rows have in common: the measurements of one reading share most columns, and
/// each parameter would otherwise be a copy of its own.
#[derive(Default)]
struct SharedTexts([Option<Arc<str>>; 5]);

impl SharedTexts {
    fn get(&mut self, slot: usize, value: &str) -> Arc<str> {
        match &self.0[slot] {
            Some(last) if **last == *value => Arc::clone(last),
            _ => Arc::clone(self.0[slot].insert(value.into())),
        }
    }
}

fn bind_reading(row: &ReadingRow, values: &mut Values, shared: &mut SharedTexts) {
    values
        .add(shared.get(0, &row.site_id))
        .add(shared.get(1, &row.device_id))
        .add(row.epoch)
        .add(row.seq)
        .add(row.name.as_str())
        .add(row.number)
        .add(row.text.as_deref())
        .add(row.flag)
        .add(row.unit.as_deref())
        .add(row.occurred_at.0)
        .add(row.received_at.0)
        .add(shared.get(2, &row.message_id))
        .add(shared.get(3, &row.trace_id))
        .add(shared.get(4, &row.stream));
}

fn bind_session(row: &SessionRow, values: &mut Values) {
    values
        .add(row.site_id.as_str())
        .add(row.device_id.as_str())
        .add(row.client_id.as_str())
        .add(row.event.as_str())
        .add(row.cause.as_deref())
        .add(row.protocol.as_str())
        .add(row.session_generation)
        .add(row.occurred_at.0)
        .add(row.received_at.0)
        .add(row.message_id.as_str())
        .add(row.trace_id.as_str());
}

fn bind_alert(row: &AlertRow, values: &mut Values) {
    values
        .add(row.alert_id.as_str())
        .add(row.rule_id.as_str())
        .add(row.rule_version)
        .add(row.site_id.as_str())
        .add(row.device_id.as_str())
        .add(row.severity.as_str())
        .add(row.state.as_str())
        .add(row.raised_at.0)
        .add(row.cleared_at.map(|t| t.0))
        .add(row.summary.as_str())
        .add(row.message_id.as_str())
        .add(row.trace_id.as_str())
        .add(row.received_at.0);
}

fn bind_twin(row: &TwinRow, values: &mut Values) {
    values
        .add(row.site_id.as_str())
        .add(row.device_id.as_str())
        .add(row.reported_version)
        .add(row.desired_version)
        .add(row.presence.as_str())
        .add(row.last_seen_at.0)
        .add(row.document.as_str())
        .add(row.message_id.as_str())
        .add(row.trace_id.as_str());
}

fn fail(doing: &str, error: &sqlx::Error) -> Failure {
    error::failure(Engine::Sqlite, doing, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inserts_have_every_power_of_two_and_stay_below_the_parameter_bound() {
        let inserts = Inserts::new("INSERT INTO t VALUES ", 14, " ON CONFLICT DO NOTHING");
        assert_eq!(1 << (inserts.statements.len() - 1), ROWS_PER_INSERT_MAX);
        for (log, sql) in inserts.statements.iter().enumerate() {
            assert_eq!(sql.matches('(').count(), 1 << log);
            assert!(sql.matches('?').count() == 14 << log && sql.matches('?').count() <= 32_766);
        }
    }
}
