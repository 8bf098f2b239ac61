//! What is done about each failure, as data.
//!
//! The loops look up here what to do, by the kind of stage, the step that failed and the class of the
//! failure; `throughline policy` and docs/operations.md print the same table. It is closed: a failure that no
//! rule names stops the stage, because one that nobody thought about is neither the data's fault nor something
//! that waiting cures. Every stage of a kind has the same policy; which errors of a database belong to which
//! class is a table of the store.

use crate::codes;
use crate::config::Stopped;
use crate::ports::Failure;
use std::time::Duration;
use throughline_model::stage::Kind;

/// First delay after a failure; a dependency that is back is noticed within this time at the beginning of an
/// outage.
pub const RETRY_LEAST: Duration = Duration::from_millis(100);
/// Longest delay after a failure; a dependency that was away for long is noticed within this time.
pub const RETRY_MOST: Duration = Duration::from_secs(10);

/// What a loop was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Receiving records.
    Read,
    /// Asking for the schemas of what was received.
    Schema,
    /// Reading positions, tables and state, and making the producer, before records are taken.
    Begin,
    /// The stage's own function.
    Process,
    /// The transaction that carries outputs, or rows, with the offsets.
    Write,
    /// What an act stage does outside.
    Deliver,
}

impl Step {
    /// Returns the name for people and scripts.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Schema => "schema",
            Self::Begin => "begin",
            Self::Process => "process",
            Self::Write => "write",
            Self::Deliver => "deliver",
        }
    }
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A service is down or slow.
    Dependency,
    /// Another writer owns the partition, or a commit's fate is unknown.
    Fenced,
    /// The message's.
    Data,
    /// Retention deleted what was not read yet.
    Overtaken,
    /// A person must act.
    Person,
}

impl Class {
    /// Returns the name for people and scripts.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Dependency => "dependency",
            Self::Fenced => "fenced",
            Self::Data => "data",
            Self::Overtaken => "overtaken",
            Self::Person => "person",
        }
    }

    /// Returns the class of a failure of a port.
    pub const fn of(failure: &Failure) -> Self {
        match failure {
            Failure::Dependency { .. } => Self::Dependency,
            Failure::Fenced(_) => Self::Fenced,
            Failure::Data { .. } => Self::Data,
            Failure::Stop { .. } => Self::Person,
        }
    }
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// The partitions concerned are paused, what was read is kept, and the same is tried again.
    Pause,
    /// What is not committed is dropped and processed again from the committed positions.
    BeginAgain,
    /// What was to be written is halved until the record at fault is alone; that one is dead-lettered.
    Search,
    /// The record waits in the stage's retry topic while the others go on, and is dead-lettered when it was
    /// there too often.
    SetAside,
    /// The record goes to the dead-letter topic.
    DeadLetter,
    /// It is counted and said, and the next record is taken.
    GoOn,
    /// The stage ends with a code.
    Stop,
}

impl Response {
    /// Returns the name for people and scripts.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::BeginAgain => "begin again",
            Self::Search => "search",
            Self::SetAside => "set aside",
            Self::DeadLetter => "dead-letter",
            Self::GoOn => "go on",
            Self::Stop => "stop",
        }
    }

    /// Says whether it is tried again, with delays from [`RETRY_LEAST`] to [`RETRY_MOST`] and without an end.
    pub const fn is_retried(self) -> bool {
        matches!(self, Self::Pause | Self::BeginAgain)
    }
}

/// What is done about a class of failures in some steps of some kinds of stage.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Rule {
    pub kinds: &'static [Kind],
    pub steps: &'static [Step],
    pub classes: &'static [Class],
    pub response: Response,
    /// What happened, for people.
    pub when: &'static str,
    /// What it means for records.
    pub then: &'static str,
    /// Where it shows.
    pub shows: &'static str,
}

const LOOPS: &[Kind] = &[Kind::Decide, Kind::Load, Kind::Act];
const DEPENDENCY_SHOWS: &str = "dependency down in `/v1/status`, one line in the log, `retries_total`, lag";

/// The policy. No two rules are about the same kind, step and class.
pub const RULES: &[Rule] = &[
    Rule {
        kinds: LOOPS,
        steps: &[Step::Read],
        classes: &[Class::Dependency],
        response: Response::Pause,
        when: "Kafka delivers nothing",
        then: "polling goes on, timers of decide stages wait; nothing is dead-lettered",
        shows: DEPENDENCY_SHOWS,
    },
    Rule {
        kinds: LOOPS,
        steps: &[Step::Read],
        classes: &[Class::Overtaken],
        response: Response::GoOn,
        when: "retention deleted records before they were read",
        then: "they are counted as overtaken in the books, and the first record there is comes next",
        shows: "`overtaken_total`, an error in the log; before it `retention_headroom_seconds`",
    },
    Rule {
        kinds: LOOPS,
        steps: &[Step::Schema],
        classes: &[Class::Dependency],
        response: Response::Pause,
        when: "the registry is away, or has not known an id for less than 5 s",
        then: "the partition waits, the others go on; nothing is dead-lettered, however long it lasts",
        shows: DEPENDENCY_SHOWS,
    },
    Rule {
        kinds: LOOPS,
        steps: &[Step::Schema, Step::Process],
        classes: &[Class::Data],
        response: Response::DeadLetter,
        when: "the registry has not known an id for 5 s, or the stage refuses the record",
        then: "it goes to `<topic>.<stage>-dlt` with its code, byte for byte, and the next one is taken",
        shows: "`dead_letters_total`, `throughline dlq list`",
    },
    Rule {
        kinds: LOOPS,
        steps: &[Step::Begin],
        classes: &[Class::Dependency, Class::Fenced],
        response: Response::Pause,
        when: "positions, tables or state cannot be read, or the producer cannot be made",
        then: "the partitions deliver nothing until it succeeds; those that began go on",
        shows: DEPENDENCY_SHOWS,
    },
    Rule {
        kinds: &[Kind::Decide, Kind::Act],
        steps: &[Step::Write],
        classes: &[Class::Dependency, Class::Fenced],
        response: Response::BeginAgain,
        when: "Kafka takes no records, another producer took over, or the commit's fate is unknown",
        then: "producer and state are dropped and restored; what took effect is not repeated, but for what an act stage did outside, which is repeated under the same id",
        shows: "`recoveries_total`, a line in the log, dependency `kafka`",
    },
    Rule {
        kinds: &[Kind::Load],
        steps: &[Step::Write],
        classes: &[Class::Dependency],
        response: Response::Pause,
        when: "the database is away, slow, full or locked, or Kafka takes no dead letter",
        then: "every partition waits; the rows are kept and written again; nothing is dead-lettered",
        shows: DEPENDENCY_SHOWS,
    },
    Rule {
        kinds: &[Kind::Load],
        steps: &[Step::Write],
        classes: &[Class::Fenced],
        response: Response::BeginAgain,
        when: "another writer moved the offset",
        then: "the rows are dropped; the partitions begin at the positions in the store",
        shows: "`recoveries_total`, a line in the log",
    },
    Rule {
        kinds: &[Kind::Load],
        steps: &[Step::Write],
        classes: &[Class::Data],
        response: Response::Search,
        when: "the database refuses a row",
        then: "its record is found and goes to `<topic>.<stage>-dlt`; all others are written",
        shows: "`dead_letters_total{reason=\"sqlstate_…\"}`, a line in the log",
    },
    Rule {
        kinds: &[Kind::Act],
        steps: &[Step::Deliver],
        classes: &[Class::Dependency],
        response: Response::Pause,
        when: "the other side takes nothing, whatever it is",
        then: "everything waits, one delivery is tried at a time; nothing is dead-lettered, however long it lasts",
        shows: DEPENDENCY_SHOWS,
    },
    Rule {
        kinds: &[Kind::Act],
        steps: &[Step::Deliver],
        classes: &[Class::Data],
        response: Response::SetAside,
        when: "one record fails again while others pass",
        then: "it goes to `<topic>.<stage>-retry` and the others go on; after 12 times it is dead-lettered",
        shows: "`messages_total{reason=\"set_aside\"}`, then `dead_letters_total`",
    },
    Rule {
        kinds: LOOPS,
        steps: &[Step::Read, Step::Schema, Step::Begin, Step::Process, Step::Write],
        classes: &[Class::Person],
        response: Response::Stop,
        when: "going on would skip, repeat or corrupt, and waiting does not cure it",
        then: "nothing is committed; other roles of the process go on",
        shows: "`/readyz` and `/healthz` answer 503 with the code that `throughline explain` describes",
    },
];

/// Returns the rule about a class of failures in a step, or `None` where none names it.
pub fn rule(kind: Kind, step: Step, class: Class) -> Option<&'static Rule> {
    let is_about = |rule: &&Rule| {
        rule.kinds.contains(&kind) && rule.steps.contains(&step) && rule.classes.contains(&class)
    };
    RULES.iter().find(is_about)
}

/// Where a failure was met.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    pub(crate) stage: &'static str,
    pub(crate) kind: Kind,
    pub(crate) step: Step,
}

/// Returns what the policy says about a failure, with the failure. `able` is what the caller can do there.
///
/// # Errors
/// [`Stopped`] where the policy says so, where no rule names the failure, or where the caller is not able to
/// do what the rule says.
pub(crate) fn respond(at: At, failure: Failure, able: &[Response]) -> Result<(Response, Failure), Stopped> {
    let found = rule(at.kind, at.step, Class::of(&failure)).map(|rule| rule.response);
    match (found, failure) {
        (_, Failure::Stop { code, message }) => Err(Stopped { stage: at.stage, code, message }),
        (Some(response), failure) if able.contains(&response) => Ok((response, failure)),
        (_, failure) => {
            let message = format!("in the step `{}`: {failure}", at.step.label());
            Err(Stopped { stage: at.stage, code: codes::UNFORESEEN, message })
        }
    }
}

/// As [`respond`], where the caller is able to do one thing only.
pub(crate) fn only(at: At, failure: Failure, able: Response) -> Result<Failure, Stopped> {
    respond(at, failure, &[able]).map(|(_, failure)| failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [Step; 6] =
        [Step::Read, Step::Schema, Step::Begin, Step::Process, Step::Write, Step::Deliver];
    const CLASSES: [Class; 5] =
        [Class::Dependency, Class::Fenced, Class::Data, Class::Overtaken, Class::Person];

    fn failures() -> [Failure; 4] {
        [
            Failure::Dependency { dependency: "database", message: "away".to_owned() },
            Failure::Fenced("another one".to_owned()),
            Failure::Data { code: "sqlstate_22003".to_owned(), message: "too large".to_owned() },
            Failure::Stop { code: codes::FOREIGN_OFFSET, message: "moved".to_owned() },
        ]
    }

    #[test]
    fn no_two_rules_are_about_the_same() {
        for kind in [Kind::Decide, Kind::Load, Kind::Act] {
            for step in STEPS {
                for class in CLASSES {
                    let about = RULES.iter().filter(|rule| {
                        rule.kinds.contains(&kind)
                            && rule.steps.contains(&step)
                            && rule.classes.contains(&class)
                    });
                    assert!(about.count() <= 1, "{kind:?} {step:?} {class:?}");
                }
            }
        }
    }

    #[test]
    fn a_dependency_is_never_the_datas_fault_and_is_retried_for_ever() {
        for kind in [Kind::Decide, Kind::Load, Kind::Act] {
            for step in [Step::Read, Step::Schema, Step::Begin, Step::Write] {
                let found = rule(kind, step, Class::Dependency).expect("every step has a dependency");
                assert!(found.response.is_retried(), "{kind:?} {step:?}");
            }
        }
    }

    #[test]
    fn every_class_meets_what_its_rule_says_and_what_no_rule_names_stops() {
        use Response::{BeginAgain, Pause, Search};
        // As the loops ask: what is met there by a dependency, a fence and the data.
        for (kind, step, able, expected) in [
            (Kind::Decide, Step::Read, &[Pause][..], [Some(Pause), None, None]),
            (Kind::Decide, Step::Schema, &[Pause], [Some(Pause), None, None]),
            (Kind::Decide, Step::Begin, &[Pause], [Some(Pause), Some(Pause), None]),
            (Kind::Decide, Step::Write, &[BeginAgain], [Some(BeginAgain), Some(BeginAgain), None]),
            (Kind::Load, Step::Schema, &[Pause], [Some(Pause), None, None]),
            (Kind::Load, Step::Begin, &[Pause], [Some(Pause), Some(Pause), None]),
            (
                Kind::Load,
                Step::Write,
                &[Pause, BeginAgain, Search],
                [Some(Pause), Some(BeginAgain), Some(Search)],
            ),
        ] {
            let at = At { stage: "some_stage", kind, step };
            let [dependency, fenced, data, person] = failures();
            for (failure, expected) in [dependency, fenced, data].into_iter().zip(expected) {
                let shown = format!("{kind:?} {step:?} {failure}");
                match respond(at, failure, able) {
                    Ok((response, _)) => assert_eq!(Some(response), expected, "{shown}"),
                    Err(stopped) => {
                        assert_eq!((expected, stopped.code), (None, codes::UNFORESEEN), "{shown}");
                    }
                }
            }
            let stopped = respond(at, person, able).expect_err("a person must act");
            assert_eq!((stopped.stage, stopped.code), ("some_stage", codes::FOREIGN_OFFSET));
        }
    }
}
