//! A plain binary COPY: what `throughline bench` measures the PostgreSQL store beside.

use crate::error::{Engine, dependency, failure};
use crate::postgres::copy::{CopyBuffer, CopyRow};
use sqlx::{Connection, Executor};
use std::time::{Duration, Instant};
use throughline_model::rows::ReadingRow;
use throughline_runtime::ports::Failure;

/// As much as goes to the server at once.
const CHUNK_BYTES: usize = 128 * 1_024;

/// A table with the columns of `reading`, without its partitions and indexes, in a schema of its own.
const TABLE: &str = "CREATE SCHEMA IF NOT EXISTS throughline_bench; \
    DROP TABLE IF EXISTS throughline_bench.reading; \
    CREATE TABLE throughline_bench.reading (LIKE reading); \
    SET search_path TO throughline_bench";

/// Copies `rows` `times` times, each in a transaction of its own, and returns the time it took. The bytes
/// are made once: what is measured is connection and server. The store's tables must exist already.
///
/// # Errors
/// [`Failure::Dependency`] or [`Failure::Stop`] when PostgreSQL refuses.
pub fn copy(url: &str, rows: &[ReadingRow], times: u64) -> Result<Duration, Failure> {
    let mut buffer = CopyBuffer::default();
    buffer.begin();
    for row in rows {
        row.encode(&mut buffer);
    }
    buffer.end();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| dependency(format!("cannot start the database client: {e}")))?;
    let copied = runtime.block_on(async {
        let mut connection = sqlx::PgConnection::connect(url).await?;
        connection.execute(sqlx::raw_sql(TABLE)).await?;
        let begun = Instant::now();
        for _ in 0..times {
            let mut copy = connection.copy_in_raw(ReadingRow::STATEMENT).await?;
            for chunk in buffer.bytes().chunks(CHUNK_BYTES) {
                copy.send(chunk).await?;
            }
            copy.finish().await?;
        }
        let took = begun.elapsed();
        connection.close().await?;
        Ok(took)
    });
    copied.map_err(|e: sqlx::Error| failure(Engine::Postgres, "copying plain rows", &e))
}
