//! Failure classes: whose fault an error of the database is.
//!
//! One function decides, over two closed tables. A code that is in neither table stops the stage: an error
//! that nobody thought about is neither the data's fault nor something that waiting cures.

use std::fmt::Display;
use throughline_runtime::ports::Failure;

/// The codes that operators see, with what `throughline explain` says about them.
pub const CODES: &[(&str, &str)] = &[
    (
        URL,
        "The database URL cannot be used. Write sqlite:///absolute/path.db or postgres://user@host/database.",
    ),
    (
        NEWER_SCHEMA,
        "The database was migrated by a newer version of throughline. Run that version, or newer.",
    ),
    (
        TOPIC_UNKNOWN,
        "The id of a topic is not known, so the store cannot tell whether stored offsets count in it. \
         Create the topics with `throughline topics apply` and start again.",
    ),
    (
        INCARNATION,
        "The stored offset counts in another cluster or in a topic of the same name that was deleted. Going \
         on would skip or repeat records. `throughline groups adopt` begins a new volume at an offset that \
         you choose.",
    ),
    (
        REFUSED,
        "The database refused a statement for a reason that is neither the data's nor cured by waiting: \
         a missing table or right, a changed constraint. Compare the schema with the migrations.",
    ),
    (NO_OFFSET, "Rows were to be written without an offset, so that a repeat could not be recognised."),
];

pub(crate) const URL: &str = "TL-STORE-001";
pub(crate) const NEWER_SCHEMA: &str = "TL-STORE-002";
pub(crate) const TOPIC_UNKNOWN: &str = "TL-STORE-003";
pub(crate) const INCARNATION: &str = "TL-STORE-004";
pub(crate) const REFUSED: &str = "TL-STORE-005";
pub(crate) const NO_OFFSET: &str = "TL-STORE-006";

/// The two databases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    Postgres,
    Sqlite,
}

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// The row's: search it and dead-letter it.
    Data,
    /// The database's: wait and try again.
    Dependency,
    /// A person's: stop.
    Stop,
}

/// SQLSTATE prefix, whether the error must name a constraint, class. The first match decides.
const POSTGRES: &[(&str, bool, Class)] = &[
    ("22", false, Class::Data),          // data exception: out of range, NUL, bad JSON
    ("23502", false, Class::Data),       // NOT NULL
    ("23514", true, Class::Data),        // CHECK; without a name it is a missing partition
    ("54000", false, Class::Data),       // row or index entry too large
    ("08", false, Class::Dependency),    // connection
    ("40", false, Class::Dependency),    // serialisation, deadlock, unknown completion
    ("53", false, Class::Dependency),    // disk full, out of memory, too many connections
    ("55P03", false, Class::Dependency), // lock not available
    ("57", false, Class::Dependency),    // shutdown, cancelled, starting up
    ("58", false, Class::Dependency),    // IO error of the server
    ("25006", false, Class::Dependency), // read only: a failover is going on
    ("25P03", false, Class::Dependency), // idle in a transaction for too long: this process was held up
    ("25P04", false, Class::Dependency), // a transaction took too long (PostgreSQL 17)
    ("28", false, Class::Dependency),    // authorisation: secrets are rotated
];

/// Extended result codes of SQLite that are the data's fault.
const SQLITE_DATA: &[i32] = &[
    18,    // TOOBIG
    20,    // MISMATCH
    275,   // CONSTRAINT_CHECK
    1_299, // CONSTRAINT_NOTNULL
    3_091, // CONSTRAINT_DATATYPE
];

/// Primary result codes of SQLite (the low byte) that waiting may cure.
const SQLITE_DEPENDENCY: &[i32] = &[
    5,  // BUSY
    6,  // LOCKED
    7,  // NOMEM
    10, // IOERR
    13, // FULL
    14, // CANTOPEN
];

/// Says whose fault an error code of the database is.
pub(crate) fn classify(engine: Engine, code: &str, constraint: Option<&str>) -> Class {
    match engine {
        Engine::Postgres => POSTGRES
            .iter()
            .find(|(prefix, named, _)| code.starts_with(prefix) && (!named || constraint.is_some()))
            .map_or(Class::Stop, |(_, _, class)| *class),
        Engine::Sqlite => match code.parse::<i32>() {
            Ok(code) if SQLITE_DATA.contains(&code) => Class::Data,
            Ok(code) if SQLITE_DEPENDENCY.contains(&(code & 0xff)) => Class::Dependency,
            _ => Class::Stop,
        },
    }
}

/// Turns an error of the client library into a failure. The message names code, table, column and
/// constraint; the text of a data error is left out, because PostgreSQL quotes the data in it.
pub(crate) fn failure(engine: Engine, doing: &str, error: &sqlx::Error) -> Failure {
    let database = match error {
        sqlx::Error::Database(database) => database,
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_) // the stream ended within a message
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::BeginFailed
        | sqlx::Error::WorkerCrashed => return dependency(format!("cannot {doing}: {error}")),
        other => return Failure::Stop { code: REFUSED, message: format!("cannot {doing}: {other}") },
    };
    let code = database.code().unwrap_or_default();
    let constraint = database.constraint();
    match classify(engine, &code, constraint) {
        Class::Dependency => dependency(format!("cannot {doing}: {} (code {code})", database.message())),
        Class::Stop => Failure::Stop {
            code: REFUSED,
            message: format!(
                "cannot {doing}: {} (code {code}); compare the schema with the migrations",
                database.message()
            ),
        },
        Class::Data => Failure::Data { code: data_code(engine, &code), message: place(engine, error) },
    }
}

/// A dependency failure of the database.
pub(crate) fn dependency(message: impl Display) -> Failure {
    Failure::Dependency { dependency: "database", message: message.to_string() }
}

fn data_code(engine: Engine, code: &str) -> String {
    match engine {
        Engine::Postgres => format!("sqlstate_{code}"),
        Engine::Sqlite => format!("sqlite_{code}"),
    }
}

/// Says where a data error lies, by names of the schema alone.
fn place(engine: Engine, error: &sqlx::Error) -> String {
    let Some(database) = error.as_database_error() else {
        return "the database refused a row".to_owned();
    };
    if engine == Engine::Sqlite {
        // SQLite's messages name tables, columns and constraints, never values.
        return format!("the database refused a row: {}", database.message());
    }
    let mut text = "the database refused a row".to_owned();
    if let Some(pg) = database.try_downcast_ref::<sqlx::postgres::PgDatabaseError>() {
        let names = [
            ("table", pg.table()),
            ("column", pg.column()),
            ("type", pg.data_type()),
            ("constraint", pg.constraint()),
        ];
        for (what, name) in names {
            if let Some(name) = name {
                text.push_str(&format!(", {what} {name}"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_code_has_its_class_and_the_rest_stops() {
        let postgres: &[(&str, Option<&str>, Class)] = &[
            ("22003", None, Class::Data),
            ("22P02", None, Class::Data),
            ("22021", None, Class::Data),
            ("22P05", None, Class::Data),
            ("23502", None, Class::Data),
            ("23514", Some("alert_state_is_known"), Class::Data),
            ("23514", None, Class::Stop),
            ("54000", None, Class::Data),
            ("54001", None, Class::Stop),
            ("08006", None, Class::Dependency),
            ("08P01", None, Class::Dependency),
            ("40001", None, Class::Dependency),
            ("40P01", None, Class::Dependency),
            ("40003", None, Class::Dependency),
            ("53100", None, Class::Dependency),
            ("53300", None, Class::Dependency),
            ("55P03", None, Class::Dependency),
            ("55006", None, Class::Stop),
            ("57014", None, Class::Dependency),
            ("57P01", None, Class::Dependency),
            ("57P03", None, Class::Dependency),
            ("58030", None, Class::Dependency),
            ("25006", None, Class::Dependency),
            ("25P02", None, Class::Stop),
            ("25P03", None, Class::Dependency),
            ("25P04", None, Class::Dependency),
            ("28P01", None, Class::Dependency),
            ("28000", None, Class::Dependency),
            ("23505", Some("alert_pkey"), Class::Stop),
            ("23503", Some("some_fk"), Class::Stop),
            ("42P01", None, Class::Stop),
            ("42501", None, Class::Stop),
            ("3D000", None, Class::Stop),
            ("XX000", None, Class::Stop),
            ("", None, Class::Stop),
        ];
        for (code, constraint, class) in postgres {
            assert_eq!(classify(Engine::Postgres, code, *constraint), *class, "sqlstate {code}");
        }
        let sqlite = [
            (18, Class::Data),
            (20, Class::Data),
            (275, Class::Data),
            (1_299, Class::Data),
            (3_091, Class::Data),
            (5, Class::Dependency),
            (261, Class::Dependency), // BUSY_RECOVERY
            (517, Class::Dependency), // BUSY_SNAPSHOT
            (6, Class::Dependency),
            (7, Class::Dependency),
            (10, Class::Dependency),
            (4_106, Class::Dependency), // IOERR_FSYNC of the family
            (13, Class::Dependency),
            (14, Class::Dependency),
            (1, Class::Stop),
            (8, Class::Stop),
            (11, Class::Stop),
            (19, Class::Stop),
            (787, Class::Stop),   // FOREIGNKEY
            (1_555, Class::Stop), // PRIMARYKEY
            (2_067, Class::Stop), // UNIQUE
        ];
        for (code, class) in sqlite {
            assert_eq!(classify(Engine::Sqlite, &code.to_string(), None), class, "sqlite {code}");
        }
        assert_eq!(classify(Engine::Sqlite, "nonsense", None), Class::Stop);
    }

    #[test]
    fn every_code_is_explained_once() {
        let mut codes: Vec<_> = CODES.iter().map(|(code, _)| *code).collect();
        codes.dedup();
        assert_eq!(codes.len(), CODES.len());
        assert!(CODES.iter().all(|(_, text)| text.ends_with('.')));
    }
}
