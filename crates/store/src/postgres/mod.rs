//! PostgreSQL: COPY into day partitions, behind a compare-and-swap of the offsets.

pub(crate) mod copy;
mod partitions;

use crate::error::{self, Engine, dependency};
use crate::read::{self, OffsetTuple, SessionTuple, Table, TwinTuple};
use crate::{Step, StoredOffset, Write, fenced, migrate};
use copy::{CopyBuffer, CopyRow};
use partitions::Partitions;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};
use std::future::Future;
use std::str::FromStr;
use std::time::Duration;
use throughline_model::rows::{AlertRow, SessionRow, TwinRow};
use throughline_runtime::ports::Failure;

/// COPY data is sent in pieces of this size: it stays in the cache between encoding and sending, and the
/// server works on one while the next is encoded.
const COPY_CHUNK_BYTES: usize = 128 * 1024;

/// Moves all offsets of a write in one statement; fewer rows than asked for is another writer's doing.
const MOVE_OFFSETS: &str = "UPDATE stage_offset AS s SET next = w.\"to\", books = w.books, updated_at = now() \
     FROM unnest($3::text[], $4::int4[], $5::text[], $6::int8[], $7::int8[], $8::text[]) \
       AS w (topic, partition, topic_id, \"from\", \"to\", books) \
     WHERE s.cluster_id = $1 AND s.consumer_group = $2 AND s.topic = w.topic AND s.partition = w.partition \
       AND s.topic_id = w.topic_id AND s.next = w.\"from\"";

/// Inserts offsets that nobody has inserted before.
const BEAR_OFFSETS: &str = "INSERT INTO stage_offset \
       (cluster_id, consumer_group, topic, partition, topic_id, next, books) \
     SELECT $1, $2, w.topic, w.partition, w.topic_id, w.\"to\", w.books \
     FROM unnest($3::text[], $4::int4[], $5::text[], $6::int8[], $7::int8[], $8::text[]) \
       AS w (topic, partition, topic_id, \"from\", \"to\", books) \
     ON CONFLICT DO NOTHING";

const ADOPT_OFFSET: &str = "INSERT INTO stage_offset \
       (cluster_id, consumer_group, topic, partition, topic_id, next, books) \
     VALUES ($1, $2, $3, $4, $5, $6, $7) \
     ON CONFLICT (consumer_group, topic, partition) DO UPDATE SET cluster_id = excluded.cluster_id, \
       topic_id = excluded.topic_id, next = excluded.next, books = excluded.books, updated_at = now()";

const PUT_ALERTS: &str = "INSERT INTO alert (alert_id, rule_id, rule_version, site_id, device_id, severity, \
       state, raised_at, cleared_at, summary, message_id, trace_id, received_at) \
     SELECT a, r, v, s, d, y, e, timestamptz 'epoch' + raised * interval '1 microsecond', \
       timestamptz 'epoch' + cleared * interval '1 microsecond', u, m::uuid, t, \
       timestamptz 'epoch' + received * interval '1 microsecond' \
     FROM unnest($1::text[], $2::text[], $3::int8[], $4::text[], $5::text[], $6::text[], $7::text[], \
       $8::int8[], $9::int8[], $10::text[], $11::text[], $12::text[], $13::int8[]) \
       AS w (a, r, v, s, d, y, e, raised, cleared, u, m, t, received) ORDER BY a \
     ON CONFLICT (alert_id) DO UPDATE SET state = excluded.state, cleared_at = excluded.cleared_at \
       WHERE alert.cleared_at IS NULL AND excluded.cleared_at IS NOT NULL";

/// Puts twins, but none that is older than the row it meets (`TwinRow::is_older_than`).
const PUT_TWINS: &str = "INSERT INTO twin (site_id, device_id, reported_version, desired_version, presence, \
       last_seen_at, document, message_id, trace_id) \
     SELECT s, d, r, e, p, timestamptz 'epoch' + seen * interval '1 microsecond', j::json, m::uuid, t \
     FROM unnest($1::text[], $2::text[], $3::int8[], $4::int8[], $5::text[], $6::int8[], $7::text[], \
       $8::text[], $9::text[]) AS w (s, d, r, e, p, seen, j, m, t) \
     ON CONFLICT (site_id, device_id) DO UPDATE SET reported_version = excluded.reported_version, \
       desired_version = excluded.desired_version, presence = excluded.presence, \
       last_seen_at = excluded.last_seen_at, document = excluded.document, \
       message_id = excluded.message_id, trace_id = excluded.trace_id \
     WHERE excluded.last_seen_at > twin.last_seen_at OR (excluded.last_seen_at = twin.last_seen_at \
       AND excluded.reported_version >= twin.reported_version \
       AND excluded.desired_version >= twin.desired_version)";

const REMOVE_TWINS: &str = "DELETE FROM twin USING unnest($1::text[], $2::text[]) AS w (s, d) \
     WHERE site_id = w.s AND device_id = w.d";

const OFFSETS: &str = "SELECT topic, partition, cluster_id, topic_id, next, books FROM stage_offset \
     WHERE consumer_group = $1 ORDER BY topic, partition";

/// The columns of a twin as [`TwinTuple`]; extract is exact, its result a decimal number.
const TWINS: &str = "SELECT site_id, device_id, reported_version, desired_version, presence, \
       (extract(epoch FROM last_seen_at) * 1000000)::int8, document::text, message_id::text, trace_id \
     FROM twin WHERE (site_id, device_id) > ($2, $3) AND ($1::text IS NULL OR site_id = $1) \
     ORDER BY site_id, device_id LIMIT $4";

const TWIN: &str = "SELECT site_id, device_id, reported_version, desired_version, presence, \
       (extract(epoch FROM last_seen_at) * 1000000)::int8, document::text, message_id::text, trace_id \
     FROM twin WHERE site_id = $1 AND device_id = $2";

const LAST_SESSION: &str = "SELECT site_id, device_id, client_id, event, cause, protocol, session_generation, \
       (extract(epoch FROM occurred_at) * 1000000)::int8, (extract(epoch FROM received_at) * 1000000)::int8, \
       message_id::text, trace_id \
     FROM session WHERE site_id = $1 AND device_id = $2 ORDER BY received_at DESC, message_id DESC LIMIT 1";

/// A PostgreSQL store.
pub(crate) struct Postgres {
    options: PgConnectOptions,
    call_timeout: Duration,
    /// Absent after an error that leaves its state unknown; the next call connects again.
    connection: Option<PgConnection>,
    partitions: Partitions,
    buffer: CopyBuffer,
}

impl Postgres {
    pub(crate) async fn open(url: &str, call_timeout: Duration) -> Result<Self, Failure> {
        let options = PgConnectOptions::from_str(url).map_err(|e| Failure::Stop {
            code: error::URL,
            message: format!("cannot read the PostgreSQL URL: {e}"),
        })?;
        // Else every attempt to connect would fail as if the server were away.
        if matches!(options.get_ssl_mode(), PgSslMode::Require | PgSslMode::VerifyCa | PgSslMode::VerifyFull)
        {
            return Err(Failure::Stop {
                code: error::URL,
                message: "the PostgreSQL URL asks for TLS, which this program is built without; use \
                          sslmode=disable over a private network or a TLS tunnel"
                    .to_owned(),
            });
        }
        let mut store = Self {
            options: options.application_name("throughline").disable_statement_logging(),
            call_timeout,
            connection: None,
            partitions: Partitions::default(),
            buffer: CopyBuffer::default(),
        };
        let mut connection = store.connect().await?;
        bounded(call_timeout, migrate::postgres(&mut connection)).await?;
        store.connection = Some(connection);
        Ok(store)
    }

    pub(crate) async fn write(&mut self, write: &Write<'_>) -> Result<(), Failure> {
        let mut connection = self.take_connection().await?;
        let (partitions, buffer) = (&mut self.partitions, &mut self.buffer);
        let work = async {
            partitions.make_ahead(&mut connection).await?;
            partitions.make_for(&mut connection, "reading", write.readings).await?;
            partitions.make_for(&mut connection, "session", write.sessions).await?;
            transact(&mut connection, buffer, write).await?;
            Ok(connection)
        };
        self.connection = Some(bounded(self.call_timeout, work).await?);
        Ok(())
    }

    pub(crate) async fn adopt(&mut self, group: &str, cluster_id: &str, step: &Step) -> Result<(), Failure> {
        self.with("adopt an offset", async |connection| {
            sqlx::query(ADOPT_OFFSET)
                .bind(cluster_id)
                .bind(group)
                .bind(&step.topic)
                .bind(step.partition)
                .bind(&step.topic_id)
                .bind(step.to)
                .bind(&step.books)
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
                query.bind(i64::from(limit)).fetch_all(connection).await
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
            sqlx::query_scalar("SELECT 'PostgreSQL ' || current_setting('server_version')")
                .fetch_one(connection)
                .await
        })
        .await
    }

    /// Runs one statement on the connection, within the bound of a call.
    async fn with<T>(
        &mut self,
        doing: &str,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Failure> {
        let mut connection = self.take_connection().await?;
        let (connection, value) = bounded(self.call_timeout, async {
            let value = work(&mut connection).await.map_err(|e| fail(doing, &e))?;
            Ok((connection, value))
        })
        .await?;
        self.connection = Some(connection);
        Ok(value)
    }

    /// Takes the connection out: it comes back only after success. After any error it is closed, which
    /// makes the server roll back, and which is simpler than to know in what state it was left.
    async fn take_connection(&mut self) -> Result<PgConnection, Failure> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => self.connect().await,
        }
    }

    async fn connect(&self) -> Result<PgConnection, Failure> {
        let lock_ms = self.call_timeout.as_millis() / 3;
        let statement_ms = self.call_timeout.as_millis();
        // A client that vanished without closing its connection must not hold the offset's row for long.
        let settings = format!(
            "SET lock_timeout = {lock_ms}; SET statement_timeout = {statement_ms}; \
             SET idle_in_transaction_session_timeout = {}",
            statement_ms * 2
        );
        bounded(self.call_timeout, async {
            let mut connection = self.options.connect().await.map_err(|e| fail("connect", &e))?;
            sqlx::raw_sql(AssertSqlSafe(settings))
                .execute(&mut connection)
                .await
                .map_err(|e| fail("prepare the connection", &e))?;
            Ok(connection)
        })
        .await
    }
}

/// Runs the transaction of one write.
async fn transact(
    connection: &mut PgConnection,
    buffer: &mut CopyBuffer,
    write: &Write<'_>,
) -> Result<(), Failure> {
    let mut tx = connection.begin().await.map_err(|e| fail("begin a transaction", &e))?;
    let steps = [(MOVE_OFFSETS, &write.moves), (BEAR_OFFSETS, &write.births)];
    for (sql, steps) in steps {
        let changed =
            change_offsets(&mut tx, sql, write, steps).await.map_err(|e| fail("move offsets", &e))?;
        if changed != steps.len() as u64 {
            return Err(fenced(write));
        }
    }
    copy_rows(&mut tx, buffer, write.readings).await.map_err(|e| fail("write readings", &e))?;
    copy_rows(&mut tx, buffer, write.sessions).await.map_err(|e| fail("write sessions", &e))?;
    put_alerts(&mut tx, &write.alerts).await.map_err(|e| fail("write alerts", &e))?;
    remove_twins(&mut tx, &write.twins.removals).await.map_err(|e| fail("remove twins", &e))?;
    put_twins(&mut tx, &write.twins.puts).await.map_err(|e| fail("write twins", &e))?;
    tx.commit().await.map_err(|e| fail("commit (it may have happened)", &e))
}

async fn change_offsets(
    connection: &mut PgConnection,
    sql: &'static str,
    write: &Write<'_>,
    steps: &[Step],
) -> Result<u64, sqlx::Error> {
    if steps.is_empty() {
        return Ok(0);
    }
    let done = sqlx::query(sql)
        .bind(write.cluster_id)
        .bind(write.group)
        .bind(column(steps, |s| s.topic.as_str()))
        .bind(column(steps, |s| s.partition))
        .bind(column(steps, |s| s.topic_id.as_str()))
        .bind(column(steps, |s| s.from))
        .bind(column(steps, |s| s.to))
        .bind(column(steps, |s| s.books.as_str()))
        .execute(connection)
        .await?;
    Ok(done.rows_affected())
}

async fn copy_rows<R: CopyRow>(
    connection: &mut PgConnection,
    buffer: &mut CopyBuffer,
    rows: &[R],
) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut copy = connection.copy_in_raw(R::STATEMENT).await?;
    buffer.begin();
    for row in rows {
        row.encode(buffer);
        if buffer.bytes().len() >= COPY_CHUNK_BYTES {
            copy.send(buffer.bytes()).await?;
            buffer.clear();
        }
    }
    buffer.end();
    copy.send(buffer.bytes()).await?;
    copy.finish().await?;
    Ok(())
}

async fn put_alerts(connection: &mut PgConnection, alerts: &[AlertRow]) -> Result<(), sqlx::Error> {
    if alerts.is_empty() {
        return Ok(());
    }
    sqlx::query(PUT_ALERTS)
        .bind(column(alerts, |a| a.alert_id.as_str()))
        .bind(column(alerts, |a| a.rule_id.as_str()))
        .bind(column(alerts, |a| a.rule_version))
        .bind(column(alerts, |a| a.site_id.as_str()))
        .bind(column(alerts, |a| a.device_id.as_str()))
        .bind(column(alerts, |a| a.severity.as_str()))
        .bind(column(alerts, |a| a.state.as_str()))
        .bind(column(alerts, |a| a.raised_at.0))
        .bind(column(alerts, |a| a.cleared_at.map(|t| t.0)))
        .bind(column(alerts, |a| a.summary.as_str()))
        .bind(column(alerts, |a| a.message_id.as_str()))
        .bind(column(alerts, |a| a.trace_id.as_str()))
        .bind(column(alerts, |a| a.received_at.0))
        .execute(connection)
        .await?;
    Ok(())
}

async fn put_twins(connection: &mut PgConnection, twins: &[&TwinRow]) -> Result<(), sqlx::Error> {
    if twins.is_empty() {
        return Ok(());
    }
    sqlx::query(PUT_TWINS)
        .bind(column(twins, |t| t.site_id.as_str()))
        .bind(column(twins, |t| t.device_id.as_str()))
        .bind(column(twins, |t| t.reported_version))
        .bind(column(twins, |t| t.desired_version))
        .bind(column(twins, |t| t.presence.as_str()))
        .bind(column(twins, |t| t.last_seen_at.0))
        .bind(column(twins, |t| t.document.as_str()))
        .bind(column(twins, |t| t.message_id.as_str()))
        .bind(column(twins, |t| t.trace_id.as_str()))
        .execute(connection)
        .await?;
    Ok(())
}

async fn remove_twins(connection: &mut PgConnection, twins: &[&TwinRow]) -> Result<(), sqlx::Error> {
    if twins.is_empty() {
        return Ok(());
    }
    sqlx::query(REMOVE_TWINS)
        .bind(column(twins, |t| t.site_id.as_str()))
        .bind(column(twins, |t| t.device_id.as_str()))
        .execute(connection)
        .await?;
    Ok(())
}

/// Collects one column of rows, for `unnest`.
fn column<'a, R, T>(rows: &'a [R], value: impl Fn(&'a R) -> T) -> Vec<T> {
    rows.iter().map(value).collect()
}

fn fail(doing: &str, error: &sqlx::Error) -> Failure {
    error::failure(Engine::Postgres, doing, error)
}

/// Bounds a call: a server that neither answers nor closes counts as unavailable.
async fn bounded<T>(timeout: Duration, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    match tokio::time::timeout(timeout, work).await {
        Ok(result) => result,
        Err(_) => Err(dependency(format!("PostgreSQL did not answer within {} s", timeout.as_secs_f32()))),
    }
}
