//! Failure classes: whose fault an error of the database is.
//!
//! One function decides, over one closed table. A code that is not in it stops the stage: an error that
//! nobody thought about is neither the data's fault nor something that waiting cures. What a stage does about
//! each class is a table of the runtime.

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
pub enum Engine {
    /// Codes are SQLSTATEs.
    Postgres,
    /// Codes are extended result codes.
    Sqlite,
}

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The row's: search it and dead-letter it.
    Data,
    /// The database's: wait and try again.
    Dependency,
    /// A person's: stop.
    Stop,
}

impl Class {
    /// Returns the name for people and scripts.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Dependency => "dependency",
            Self::Stop => "stop",
        }
    }
}

/// Which errors of a database a line of [`FAILURE_CLASSES`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// SQLSTATEs that begin so.
    SqlState(&'static str),
    /// The SQLSTATE, where the error names a constraint.
    WithConstraint(&'static str),
    /// The extended result code of SQLite.
    Extended(i32),
    /// Every code of SQLite whose low byte is this primary one.
    Primary(i32),
}

impl Codes {
    fn has(self, engine: Engine, code: &str, constraint: Option<&str>) -> bool {
        let number = || code.parse::<i32>().ok();
        match (engine, self) {
            (Engine::Postgres, Self::SqlState(prefix)) => code.starts_with(prefix),
            (Engine::Postgres, Self::WithConstraint(state)) => code == state && constraint.is_some(),
            (Engine::Sqlite, Self::Extended(extended)) => number() == Some(extended),
            (Engine::Sqlite, Self::Primary(primary)) => number().is_some_and(|code| code & 0xff == primary),
            _ => false,
        }
    }
}

impl Display for Codes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::SqlState(prefix) if prefix.len() < 5 => write!(f, "SQLSTATE {prefix}xxx"),
            Self::SqlState(state) => write!(f, "SQLSTATE {state}"),
            Self::WithConstraint(state) => write!(f, "SQLSTATE {state} with the name of a constraint"),
            Self::Extended(code) => write!(f, "SQLite {code}"),
            Self::Primary(code) => write!(f, "SQLite {code} and its extended codes"),
        }
    }
}

/// A line of the table.
#[derive(Clone, Copy, Debug)]
pub struct FailureClass {
    /// Which errors.
    pub codes: Codes,
    /// Whose fault they are.
    pub class: Class,
    /// What they mean.
    pub what: &'static str,
}

const fn line(codes: Codes, class: Class, what: &'static str) -> FailureClass {
    FailureClass { codes, class, what }
}

/// Every error that is not a person's to look at; the first line that has it decides. No line overlaps
/// another, and `throughline policy` and docs/operations-database.md print them.
pub const FAILURE_CLASSES: &[FailureClass] = &[
    line(Codes::SqlState("22"), Class::Data, "data exception: out of range, NUL, bad JSON"),
    line(Codes::SqlState("23502"), Class::Data, "NOT NULL"),
    line(Codes::WithConstraint("23514"), Class::Data, "CHECK; without a name it is a missing partition"),
    line(Codes::SqlState("54000"), Class::Data, "a row or index entry is too large"),
    line(Codes::Extended(18), Class::Data, "TOOBIG"),
    line(Codes::Extended(20), Class::Data, "MISMATCH"),
    line(Codes::Extended(275), Class::Data, "CONSTRAINT_CHECK"),
    line(Codes::Extended(1_299), Class::Data, "CONSTRAINT_NOTNULL"),
    line(Codes::Extended(3_091), Class::Data, "CONSTRAINT_DATATYPE"),
    line(Codes::SqlState("08"), Class::Dependency, "connection"),
    line(Codes::SqlState("40"), Class::Dependency, "serialisation, deadlock, unknown completion"),
    line(Codes::SqlState("53"), Class::Dependency, "disk full, out of memory, too many connections"),
    line(Codes::SqlState("55P03"), Class::Dependency, "a lock is not available"),
    line(Codes::SqlState("57"), Class::Dependency, "shutdown, cancelled, starting up"),
    line(Codes::SqlState("58"), Class::Dependency, "IO error of the server"),
    line(Codes::SqlState("25006"), Class::Dependency, "read only: a failover is going on"),
    line(Codes::SqlState("25P03"), Class::Dependency, "idle in a transaction: this process was held up"),
    line(Codes::SqlState("25P04"), Class::Dependency, "a transaction took too long (PostgreSQL 17)"),
    line(Codes::SqlState("28"), Class::Dependency, "authorisation: secrets are rotated"),
    line(Codes::Primary(5), Class::Dependency, "BUSY"),
    line(Codes::Primary(6), Class::Dependency, "LOCKED"),
    line(Codes::Primary(7), Class::Dependency, "NOMEM"),
    line(Codes::Primary(10), Class::Dependency, "IOERR"),
    line(Codes::Primary(13), Class::Dependency, "FULL"),
    line(Codes::Primary(14), Class::Dependency, "CANTOPEN"),
];

/// Says whose fault an error code of the database is.
pub(crate) fn classify(engine: Engine, code: &str, constraint: Option<&str>) -> Class {
    let found = FAILURE_CLASSES.iter().find(|line| line.codes.has(engine, code, constraint));
    found.map_or(Class::Stop, |line| line.class)
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
        for line in FAILURE_CLASSES {
            let is_tested = match line.codes {
                Codes::SqlState(_) | Codes::WithConstraint(_) => {
                    postgres.iter().any(|(code, name, class)| {
                        line.codes.has(Engine::Postgres, code, *name) && *class == line.class
                    })
                }
                Codes::Extended(_) | Codes::Primary(_) => sqlite.iter().any(|(code, class)| {
                    line.codes.has(Engine::Sqlite, &code.to_string(), None) && *class == line.class
                }),
            };
            assert!(is_tested, "{} has an example above", line.codes);
        }
    }

    #[test]
    fn what_the_client_library_says_of_itself_is_the_dependencys_or_a_persons() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        for error in [
            sqlx::Error::Io(refused),
            sqlx::Error::PoolTimedOut,
            sqlx::Error::PoolClosed,
            sqlx::Error::WorkerCrashed,
            sqlx::Error::Protocol("the stream ended".to_owned()),
        ] {
            let failure = failure(Engine::Postgres, "write rows", &error);
            assert!(matches!(failure, Failure::Dependency { dependency: "database", .. }), "{error}");
        }
        let failure = failure(Engine::Postgres, "write rows", &sqlx::Error::RowNotFound);
        assert!(matches!(failure, Failure::Stop { code: REFUSED, .. }), "{failure}");
    }

    #[test]
    fn every_code_is_explained_once() {
        let mut codes: Vec<_> = CODES.iter().map(|(code, _)| *code).collect();
        codes.dedup();
        assert_eq!(codes.len(), CODES.len());
        assert!(CODES.iter().all(|(_, text)| text.ends_with('.')));
    }
}
