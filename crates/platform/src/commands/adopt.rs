//! `throughline groups adopt`: where a group goes on after its offsets stopped to mean what they did: moved
//! by a foreign tool, or counted in a cluster or topic that was replaced, or in a database that fell back. A
//! new, named volume of the books begins there, unless the database's own books still fit. Decide stages keep
//! their offsets in Kafka, load stages in the database with a copy in Kafka.

use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::roles::{stage_specs, store_options, subscription};
use std::collections::{BTreeSet, HashMap};
use throughline_kafka::admin::{Admin, CommittedOffset, commit_for_group};
use throughline_kafka::{KafkaConfig, ask_incarnation};
use throughline_model::books::Books;
use throughline_model::catalog::parse_replay;
use throughline_model::record::TopicPartition;
use throughline_model::stage::{Kind, StageSpec};
use throughline_model::strict_toml::suggestion;
use throughline_runtime::Incarnation;
use throughline_runtime::ports::Advance;
use throughline_store::SqlStore;
use uuid::Uuid;

/// Which offsets, and where they go on.
#[derive(clap::Args)]
pub struct Adoption {
    /// The group; stop its members first
    group: String,
    /// Only the partitions of this topic
    #[arg(long)]
    topic: Option<String>,
    /// Where to go on instead of where the offset stands
    #[arg(long, value_enum)]
    begin: Option<Begin>,
    /// With `--begin`, move the offsets as well that nothing is wrong with
    #[arg(long)]
    all: bool,
    /// Do it; without it the command only shows what it would do
    #[arg(long)]
    yes: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Begin {
    /// The first record that still exists: what was processed before may be processed again
    Earliest,
    /// The present end: what is there and was not processed is skipped
    End,
    /// Where the offset stands: right where only the state was lost, or the records are the same
    Here,
}

/// An offset as it stands.
struct Standing {
    partition: TopicPartition,
    /// −1 where there is none.
    next: i64,
    /// Absent where a foreign tool wrote it.
    books: Option<Books>,
    /// Whether it counts in the present cluster, topic and changelog.
    is_of_here: bool,
    /// Kafka's copy of what the database holds, where it is a copy.
    copy: Option<i64>,
}

impl Standing {
    /// Says whether the database lost what it once held.
    fn fell_back(&self) -> bool {
        self.copy.is_some_and(|copy| copy > self.next)
    }
}

/// What is to be committed, and what to say about it.
struct Adopted {
    advance: Advance,
    /// Whether the books stay as they are, because nothing is wrong with them.
    keeps_books: bool,
    line: String,
}

/// Shows or does it.
///
/// # Errors
/// Exit code 1 while the group has members, 2 where a decision is missing or the topic is none of the group's, 4
/// when a dependency is away.
pub fn run(context: &Context, adoption: &Adoption) -> Result<Exit, CliError> {
    let group = adoption.group.as_str();
    let kafka = context.kafka();
    let admin = Admin::new(&kafka)?;
    let spec = stage_specs().into_iter().find(|spec| spec.group == group);
    let mut store = open_store(context, spec.as_ref())?;
    let committed = admin.group_offsets(&[group])?.into_iter().flat_map(|g| g.offsets);
    let committed: Vec<CommittedOffset> = committed.collect();
    let here = here(&kafka, &committed, spec.as_ref())?;
    let standing = match &mut store {
        None => in_kafka(&admin, &here, committed, spec.as_ref())?,
        Some(store) => in_store(store, group, committed)?,
    };
    let standing = of_topic(group, adoption.topic.as_deref(), standing)?;
    let adopted = decide(&admin, &here, adoption, standing, spec.as_ref())?;
    if adopted.is_empty() {
        output::line(&format!(
            "every offset of `{group}` counts here and carries its books: nothing to adopt"
        ));
        return Ok(Exit::Done);
    }
    for Adopted { line, .. } in &adopted {
        output::line(line);
    }
    if !adoption.yes {
        output::notice("nothing was changed; add --yes to adopt");
        return Ok(Exit::Done);
    }
    let members: usize = admin.describe_groups(&[group])?.iter().map(|g| g.members.len()).sum();
    if members > 0 {
        return Err(CliError::failed(format!("`{group}` has {members} members: stop them first")));
    }
    if let Some(store) = &mut store {
        for Adopted { advance, .. } in adopted.iter().filter(|a| !a.keeps_books) {
            store.adopt(group, &advance.partition, advance.to, &advance.books.volume)?;
        }
    }
    // Of a load stage Kafka holds a copy, which must not say that the database had more.
    let advances: Vec<Advance> = adopted.into_iter().map(|a| a.advance).collect();
    commit_for_group(&kafka, group, &advances)?;
    Ok(Exit::Done)
}

/// Opens the database of a load stage.
fn open_store(context: &Context, spec: Option<&StageSpec>) -> Result<Option<SqlStore>, CliError> {
    let Some(spec) = spec.filter(|spec| spec.kind == Kind::Load) else { return Ok(None) };
    let topics = subscription(spec, false);
    let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
    let options = store_options(context, &topics)?;
    Ok(Some(SqlStore::open(&context.config.database.url, options)?))
}

/// Asks what offsets of the group belong to now.
fn here(
    kafka: &KafkaConfig,
    committed: &[CommittedOffset],
    spec: Option<&StageSpec>,
) -> Result<Incarnation, CliError> {
    let read = spec.map(|spec| subscription(spec, false)).unwrap_or_default();
    let named = committed.iter().map(|offset| &*offset.partition.topic);
    let topics: BTreeSet<&str> = read.iter().map(String::as_str).chain(named).collect();
    let topics: Vec<&str> = topics.into_iter().collect();
    Ok(ask_incarnation(kafka, &topics, spec.and_then(|spec| spec.changelog.as_deref())).ask()?)
}

/// Returns the offsets of the topic that was asked for, of all where none was.
fn of_topic(group: &str, wanted: Option<&str>, standing: Vec<Standing>) -> Result<Vec<Standing>, CliError> {
    let Some(wanted) = wanted else { return Ok(standing) };
    let topics: BTreeSet<&str> = standing.iter().map(|s| &*s.partition.topic).collect();
    if topics.is_empty() {
        return Err(CliError::usage(format!("`{group}` has no offset in any topic, so none in `{wanted}`")));
    }
    if !topics.contains(wanted) {
        let hint = suggestion(wanted, topics.iter().copied());
        let topics: Vec<&str> = topics.into_iter().collect();
        return Err(CliError::usage(format!(
            "`{group}` has no offset in `{wanted}`{hint} (it has some in: {})",
            topics.join(", ")
        )));
    }
    Ok(standing.into_iter().filter(|s| *s.partition.topic == *wanted).collect())
}

/// Returns what is to be committed where.
fn decide(
    admin: &Admin,
    here: &Incarnation,
    adoption: &Adoption,
    standing: Vec<Standing>,
    spec: Option<&StageSpec>,
) -> Result<Vec<Adopted>, CliError> {
    let volume = format!("adopted-{}", Uuid::now_v7());
    let partitions: Vec<TopicPartition> = standing.iter().map(|s| s.partition.clone()).collect();
    let (earliest, latest) = (admin.earliest(&partitions)?, admin.latest(&partitions)?);
    let is_new = standing.iter().all(|standing| standing.next < 0);
    let (mut adopted, mut sound) = (Vec::new(), 0);
    for standing in standing {
        let (Some(first), Some(end)) = (earliest.get(&standing.partition), latest.get(&standing.partition))
        else {
            output::notice(&format!("{} does not exist any more and is left alone", standing.partition));
            continue;
        };
        let begin = begin_of(adoption, &standing, is_new, spec);
        let Some(to) = destination(begin, adoption.all, &standing, *first, *end)? else {
            sound += usize::from(adoption.begin.is_some() && standing.next >= 0);
            continue;
        };
        if writes_twice(&standing, to, spec) {
            output::notice(&format!(
                "{}: what of it failed only after the backup is read again from its input as well, and would be \
                 written twice; `--topic {} --begin end` leaves these replays out",
                standing.partition, standing.partition.topic
            ));
        }
        let mut found = adopt(standing, to, *first, &volume);
        if spec.is_none_or(|spec| spec.kind != Kind::Load) {
            let changelog = spec.and_then(|spec| spec.changelog.as_deref());
            found.advance.books.origin = Some(here.origin(&found.advance.partition.topic, changelog)?);
        }
        adopted.push(found);
    }
    if sound > 0 {
        output::notice(&format!("{sound} offsets with which nothing is wrong stay; `--all` moves them too"));
    }
    Ok(adopted)
}

/// Returns where a partition begins; a database that is new is filled from the start. What a load stage wrote by
/// a replay comes from the input again when that is read from its start; its rows have no key by which a second
/// one would be recognised. Who names the replay topic means it.
fn begin_of(
    adoption: &Adoption,
    standing: &Standing,
    is_new: bool,
    spec: Option<&StageSpec>,
) -> Option<Begin> {
    let is_load = spec.is_some_and(|spec| spec.kind == Kind::Load);
    let is_replay = parse_replay(&standing.partition.topic).is_some() && adoption.topic.is_none();
    let begin = adoption.begin.or((is_new && standing.copy.is_some()).then_some(Begin::Earliest))?;
    Some(if begin == Begin::Earliest && is_load && is_replay { Begin::End } else { begin })
}

/// Says whether replays are read again beside the inputs that they came from: those of a database that fell back.
fn writes_twice(standing: &Standing, to: i64, spec: Option<&StageSpec>) -> bool {
    let is_load = spec.is_some_and(|spec| spec.kind == Kind::Load);
    is_load
        && parse_replay(&standing.partition.topic).is_some()
        && standing.copy.is_some_and(|copy| copy > to)
}

fn adopt(standing: Standing, to: i64, first: i64, volume: &str) -> Adopted {
    let fell_back = standing.fell_back();
    let Standing { partition, next, books, copy, .. } = standing;
    let stands = match next {
        ..0 => "it has no position".to_owned(),
        next => format!("it stands at {next}"),
    };
    let copied = copy.filter(|_| fell_back).map(|copy| format!(", after it had stored up to {copy}"));
    let lost = if to < first { format!("; retention deleted {} of them", first - to) } else { String::new() };
    let keeps_books = fell_back && to == next && books.is_some();
    let (books, counted) = match books.filter(|_| keeps_books) {
        Some(books) => (books, "its books stay".to_owned()),
        None => (Books::open(volume), format!("in volume {volume}")),
    };
    Adopted {
        line: format!(
            "{partition} goes on at {to} ({stands}{}{lost}), {counted}",
            copied.unwrap_or_default()
        ),
        advance: Advance { partition, from: next, to, books },
        keeps_books,
    }
}

/// Returns where an offset goes on, or `None` where it may stay as it is.
fn destination(
    begin: Option<Begin>,
    all: bool,
    standing: &Standing,
    first: i64,
    end: i64,
) -> Result<Option<i64>, CliError> {
    let next = standing.next;
    let lies_within = (first..=end).contains(&next);
    // What retention deleted of it is counted by the stage.
    let fits = standing.is_of_here && (0..=end).contains(&next);
    let is_sound = fits && standing.books.is_some() && !standing.fell_back();
    match begin {
        // What has no defect is not to be written twice, or skipped, because its neighbour has one.
        Some(Begin::Earliest | Begin::End) if is_sound && !all => Ok(None),
        Some(Begin::Earliest) => Ok(Some(first)),
        Some(Begin::End) => Ok(Some(end)),
        Some(Begin::Here) if lies_within => Ok(Some(next)),
        // A partition that nothing was ever read of begins at its start by itself.
        None | Some(Begin::Here) if next < 0 && standing.copy.is_none() => Ok(None),
        // So does a database that is new, or older than what was first read.
        None if next < 0 => Ok(Some(first)),
        None if is_sound => Ok(None),
        None if fits && (lies_within || standing.books.is_some()) => Ok(Some(next)),
        None | Some(Begin::Here) => Err(CliError::usage(format!(
            "{} stands at {next}, which says nothing about the records from {first} to {end} that are there now: \
             decide with `--begin earliest` (nothing is skipped, repeats are possible){} or `--begin end`",
            standing.partition,
            if lies_within { ", `--begin here`" } else { "" }
        ))),
    }
}

/// Returns the offsets of a decide stage, and the partitions of its inputs that have none.
fn in_kafka(
    admin: &Admin,
    here: &Incarnation,
    committed: Vec<CommittedOffset>,
    spec: Option<&StageSpec>,
) -> Result<Vec<Standing>, CliError> {
    let changelog = spec.and_then(|spec| spec.changelog.as_deref());
    let mut all: Vec<Standing> = Vec::with_capacity(committed.len());
    for CommittedOffset { partition, next, metadata } in committed {
        let books = Books::from_metadata(&metadata).ok();
        let then = books.as_ref().and_then(|books| books.origin.as_ref());
        let now = here.origin(&partition.topic, changelog).ok();
        // Books of an older version do not say where they count.
        let is_of_here = then.is_none_or(|then| now.is_some_and(|now| *then == now));
        all.push(Standing { partition, next, books, is_of_here, copy: None });
    }
    let topics = admin.topics()?;
    for topic in spec.map(|spec| &*spec.inputs).unwrap_or_default() {
        for number in 0..topics.get(*topic).copied().unwrap_or_default() {
            let partition = TopicPartition::new(*topic, number);
            if !all.iter().any(|standing| standing.partition == partition) {
                all.push(Standing { partition, next: -1, books: None, is_of_here: true, copy: None });
            }
        }
    }
    Ok(all)
}

/// Returns the offsets of a load stage, and those of which Kafka alone has a copy.
fn in_store(
    store: &mut SqlStore,
    group: &str,
    committed: Vec<CommittedOffset>,
) -> Result<Vec<Standing>, CliError> {
    let ours = committed.into_iter().filter(|offset| Books::from_metadata(&offset.metadata).is_ok());
    let mut copies: HashMap<TopicPartition, i64> = ours.map(|o| (o.partition, o.next)).collect();
    let mut all = Vec::new();
    for stored in store.stored_offsets(group)? {
        let is_of_here = store.is_of_here(&stored);
        all.push(Standing {
            books: Books::from_metadata(&stored.books).ok(),
            is_of_here,
            copy: copies.remove(&stored.partition).filter(|_| is_of_here),
            partition: stored.partition,
            next: stored.next,
        });
    }
    let alone = copies.into_iter();
    all.extend(alone.map(|(partition, copy)| Standing {
        partition,
        next: -1,
        books: None,
        is_of_here: true,
        copy: Some(copy),
    }));
    all.sort_by(|a, b| a.partition.cmp(&b.partition));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_stays_moves_or_asks_for_a_decision() {
        let at = |next, has_books: bool, is_of_here| Standing {
            partition: TopicPartition::new("device.telemetry.v1", 0),
            next,
            books: has_books.then(Books::default),
            is_of_here,
            copy: None,
        };
        let copied = |next, copy| Standing { copy: Some(copy), ..at(next, next >= 0, true) };
        for (standing, begin, expected) in [
            (at(50, true, true), None, Some(None)),
            (at(5, true, true), None, Some(None)), // Overtaken: the stage says so itself.
            (at(50, false, true), None, Some(Some(50))),
            (at(150, true, true), None, None),
            (at(50, true, false), None, None),
            (at(150, true, true), Some(Begin::End), Some(Some(100))),
            (at(50, true, false), Some(Begin::Earliest), Some(Some(10))),
            // Beside one that was lost.
            (at(50, true, true), Some(Begin::Earliest), Some(None)),
            (at(50, true, true), Some(Begin::End), Some(None)),
            (copied(50, 60), Some(Begin::End), Some(Some(100))),
            // Its changelog is gone, say: the position is right, and somebody has to say so.
            (at(50, true, false), Some(Begin::Here), Some(Some(50))),
            (at(150, true, false), Some(Begin::Here), None),
            // Nothing was ever read of it.
            (at(-1, false, true), None, Some(None)),
            (at(-1, false, true), Some(Begin::Here), Some(None)),
            (at(-1, false, true), Some(Begin::End), Some(Some(100))),
            // A database that was restored goes on where it stands, also where retention was faster.
            (copied(50, 50), None, Some(None)),
            (copied(50, 40), None, Some(None)),
            (copied(50, 60), None, Some(Some(50))),
            (copied(5, 60), None, Some(Some(5))),
            // A new one begins at the start.
            (copied(-1, 60), None, Some(Some(10))),
        ] {
            let found = destination(begin, false, &standing, 10, 100);
            assert_eq!(found.ok(), expected, "{} {}", standing.next, standing.is_of_here);
        }
        let all = destination(Some(Begin::Earliest), true, &at(50, true, true), 10, 100);
        assert_eq!(all.ok(), Some(Some(10)), "a table is built anew");
    }

    #[test]
    fn replays_of_a_table_that_is_built_anew_are_left_out_unless_they_are_named() {
        let spec = |group: &str| stage_specs().into_iter().find(|spec| spec.group == group);
        let adoption = |topic: Option<&str>, begin| Adoption {
            group: "load_warehouse".to_owned(),
            topic: topic.map(str::to_owned),
            begin,
            all: true,
            yes: false,
        };
        let standing = |topic: &str| Standing {
            partition: TopicPartition::new(topic, 0),
            next: -1,
            books: None,
            is_of_here: true,
            copy: Some(60),
        };
        let earliest = Some(Begin::Earliest);
        let replays = "data_core.reading.v1.load_warehouse-replay";
        let (load, decide) = (spec("load_warehouse"), spec("bridge_data"));
        for (group, begin, named, is_new, topic, expected) in [
            (&load, earliest, None, false, replays, Some(Begin::End)),
            (&load, earliest, None, false, "data_core.reading.v1", earliest),
            (&load, earliest, Some(replays), false, replays, earliest),
            (&decide, earliest, None, false, "device.telemetry.v1.bridge_data-replay", earliest),
            // A database that is new, and one that was restored and is older than the first replay.
            (&load, None, None, true, replays, Some(Begin::End)),
            (&load, None, None, true, "data_core.reading.v1", earliest),
            (&load, None, None, false, replays, None),
        ] {
            let found = begin_of(&adoption(named, begin), &standing(topic), is_new, group.as_ref());
            assert!(found == expected, "{topic} {named:?} {is_new}");
        }
    }

    #[test]
    fn a_topic_that_the_group_does_not_have_is_a_usage_error_that_names_those_it_has() {
        let has = |topics: &[(&str, i32)]| -> Vec<Standing> {
            let standing = |(topic, number): &(&str, i32)| Standing {
                partition: TopicPartition::new(*topic, *number),
                next: 5,
                books: None,
                is_of_here: true,
                copy: None,
            };
            topics.iter().map(standing).collect()
        };
        let two = [("device.event.v1", 0), ("device.telemetry.v1", 0), ("device.telemetry.v1", 1)];
        let check = |wanted: Option<&str>, topics: &[(&str, i32)], expected: Result<usize, &str>| {
            let found = of_topic("update_twin", wanted, has(topics));
            assert!(found.as_ref().err().is_none_or(|error| error.exit == Exit::Usage));
            let found = found.map(|standing| standing.len()).map_err(|error| error.message);
            assert_eq!(found, expected.map_err(str::to_owned));
        };
        check(None, &two, Ok(3));
        check(None, &[], Ok(0));
        check(Some("device.telemetry.v1"), &two, Ok(2));
        check(
            Some("device.telemetri.v1"),
            &two,
            Err("`update_twin` has no offset in `device.telemetri.v1`; did you mean `device.telemetry.v1`? \
                 (it has some in: device.event.v1, device.telemetry.v1)"),
        );
        check(Some("x"), &[], Err("`update_twin` has no offset in any topic, so none in `x`"));
    }

    #[test]
    fn a_restored_database_keeps_its_books_and_a_new_one_opens_a_volume() {
        let partition = TopicPartition::new("data_core.reading.v1", 3);
        let restored = Standing {
            partition,
            next: 50,
            books: Some(Books::open("volume-1")),
            is_of_here: true,
            copy: Some(60),
        };
        let new = Standing { next: -1, books: None, partition: restored.partition.clone(), ..restored };
        let kept = adopt(restored, 50, 53, "adopted-1");
        assert_eq!(
            kept.line,
            "data_core.reading.v1/3 goes on at 50 (it stands at 50, after it had stored up to 60; retention \
             deleted 3 of them), its books stay"
        );
        assert!(kept.keeps_books && kept.advance.books.volume == "volume-1");
        let opened = adopt(new, 53, 53, "adopted-1");
        assert_eq!(
            opened.line,
            "data_core.reading.v1/3 goes on at 53 (it has no position, after it had stored up to 60), in volume adopted-1"
        );
        assert!(!opened.keeps_books && opened.advance.books.volume == "adopted-1");
    }
}
