//! The tables' versions: ordered SQL files that are built into the program.
//!
//! A file that was released is never changed; a change is a new file. `schema_migration` holds what was
//! run. Both stores run all missing files in one transaction under a lock, so that of several roles which
//! start at once one migrates and the others find it done.

use crate::error::{self, Engine};
use sqlx::{PgConnection, SqliteConnection};
use throughline_runtime::ports::Failure;

struct Migration {
    version: i64,
    name: &'static str,
    sql: &'static str,
}

const POSTGRES: &[Migration] = &[Migration {
    version: 1,
    name: "warehouse",
    sql: include_str!("../migrations/postgres/0001_warehouse.sql"),
}];

const SQLITE: &[Migration] = &[Migration {
    version: 1,
    name: "warehouse",
    sql: include_str!("../migrations/sqlite/0001_warehouse.sql"),
}];

/// PostgreSQL's advisory lock for all changes of our schema, the letters `tlschema`.
pub(crate) const LOCK_SQL: &str = "SELECT pg_advisory_xact_lock(8389759076604865889)";

const TABLE: &str = "CREATE TABLE IF NOT EXISTS schema_migration (version bigint PRIMARY KEY, name text NOT NULL, \
     applied_at text NOT NULL DEFAULT CURRENT_TIMESTAMP)";
const TABLE_SQLITE: &str = "CREATE TABLE IF NOT EXISTS schema_migration (version INTEGER PRIMARY KEY, name TEXT NOT NULL, \
     applied_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP) STRICT";
const NEWEST: &str = "SELECT max(version) FROM schema_migration";

/// Brings a PostgreSQL database up to date.
///
/// # Errors
/// [`Failure::Stop`] when it is newer than this program; else by class.
pub(crate) async fn postgres(connection: &mut PgConnection) -> Result<(), Failure> {
    use sqlx::Connection;
    let fail = |e| error::failure(Engine::Postgres, "migrate the database", &e);
    // Without the look beforehand every start would need the right to make tables.
    let known: Option<String> = sqlx::query_scalar("SELECT to_regclass('schema_migration')::text")
        .fetch_one(&mut *connection)
        .await
        .map_err(fail)?;
    if known.is_some() {
        let newest: Option<i64> =
            sqlx::query_scalar(NEWEST).fetch_one(&mut *connection).await.map_err(fail)?;
        if missing(POSTGRES, newest)?.is_empty() {
            return Ok(());
        }
    }
    let mut tx = connection.begin().await.map_err(fail)?;
    sqlx::raw_sql(LOCK_SQL).execute(&mut *tx).await.map_err(fail)?;
    sqlx::raw_sql(TABLE).execute(&mut *tx).await.map_err(fail)?;
    let newest: Option<i64> = sqlx::query_scalar(NEWEST).fetch_one(&mut *tx).await.map_err(fail)?;
    for migration in missing(POSTGRES, newest)? {
        sqlx::raw_sql(migration.sql).execute(&mut *tx).await.map_err(fail)?;
        sqlx::query("INSERT INTO schema_migration (version, name) VALUES ($1, $2)")
            .bind(migration.version)
            .bind(migration.name)
            .execute(&mut *tx)
            .await
            .map_err(fail)?;
        tracing::info!(version = migration.version, name = migration.name, "migrated the database");
    }
    tx.commit().await.map_err(fail)
}

/// Brings a SQLite file up to date.
///
/// # Errors
/// [`Failure::Stop`] when it is newer than this program; else by class.
pub(crate) async fn sqlite(connection: &mut SqliteConnection) -> Result<(), Failure> {
    use sqlx::Connection;
    let fail = |e| error::failure(Engine::Sqlite, "migrate the database", &e);
    // Without the look beforehand a reader would wait for the write lock.
    let known: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'schema_migration')",
    )
    .fetch_one(&mut *connection)
    .await
    .map_err(fail)?;
    if known {
        let newest: Option<i64> =
            sqlx::query_scalar(NEWEST).fetch_one(&mut *connection).await.map_err(fail)?;
        if missing(SQLITE, newest)?.is_empty() {
            return Ok(());
        }
    }
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(fail)?;
    sqlx::raw_sql(TABLE_SQLITE).execute(&mut *tx).await.map_err(fail)?;
    let newest: Option<i64> = sqlx::query_scalar(NEWEST).fetch_one(&mut *tx).await.map_err(fail)?;
    for migration in missing(SQLITE, newest)? {
        sqlx::raw_sql(migration.sql).execute(&mut *tx).await.map_err(fail)?;
        sqlx::query("INSERT INTO schema_migration (version, name) VALUES (?, ?)")
            .bind(migration.version)
            .bind(migration.name)
            .execute(&mut *tx)
            .await
            .map_err(fail)?;
        tracing::info!(version = migration.version, name = migration.name, "migrated the database");
    }
    tx.commit().await.map_err(fail)
}

/// Returns the migrations that are still to be run.
fn missing(all: &'static [Migration], newest: Option<i64>) -> Result<&'static [Migration], Failure> {
    let newest = newest.unwrap_or_default();
    let ours = all.last().map_or(0, |m| m.version);
    if newest > ours {
        return Err(Failure::Stop {
            code: error::NEWER_SCHEMA,
            message: format!(
                "the database is at schema version {newest}, this program knows {ours}; run the newer program"
            ),
        });
    }
    Ok(&all[all.partition_point(|m| m.version <= newest)..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrations_are_numbered_without_gaps_and_alike_on_both_stores() {
        for all in [POSTGRES, SQLITE] {
            for (index, migration) in all.iter().enumerate() {
                assert_eq!(usize::try_from(migration.version).ok(), Some(index + 1), "{}", migration.name);
            }
        }
        let names = |all: &[Migration]| all.iter().map(|m| m.name).collect::<Vec<_>>();
        assert_eq!(names(POSTGRES), names(SQLITE));
    }

    #[test]
    fn a_newer_schema_stops_and_names_both_versions() {
        let error = missing(POSTGRES, Some(99)).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("TL-STORE-002") && error.contains("99"), "{error}");
        assert_eq!(missing(POSTGRES, None).map(<[Migration]>::len).ok(), Some(POSTGRES.len()));
        assert_eq!(missing(POSTGRES, Some(1)).map(<[Migration]>::len).ok(), Some(POSTGRES.len() - 1));
    }
}
