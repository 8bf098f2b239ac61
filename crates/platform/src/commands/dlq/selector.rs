//! Which dead letters a command is about.

use super::requests;
use crate::context::Context;
use crate::failure::CliError;
use crate::records::point_in_time;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Duration;
use throughline_kafka::admin::Admin;
use throughline_kafka::browse::{Begin, Stop, browse};
use throughline_model::catalog::name::unknown_topic;
use throughline_model::catalog::parse_parking;
use throughline_model::dead_letter::{Fate, Letter, fate_of, parse_letters};
use throughline_model::envelope::{DeadLetterProgress, LetterRange};
use throughline_model::record::Record;
use throughline_runtime::{Clock, REPLAYS_MAX, WallClock};

/// How long reading the dead letters of one topic may take.
const READ_WITHIN: Duration = Duration::from_secs(120);

/// Which dead letters.
#[derive(clap::Args)]
pub struct Selector {
    /// Only this topic, `<topic>.<group>-dlt` or `-parking`
    #[arg(long)]
    topic: Option<String>,
    /// Only this code
    #[arg(long)]
    code: Option<String>,
    /// Only values framed with this schema id
    #[arg(long, value_name = "ID")]
    schema_id: Option<u32>,
    /// Only this record of the topic, `partition/offset`, or those from one offset to before another,
    /// `partition/first..end`
    #[arg(long, value_name = "PLACE")]
    at: Option<String>,
    /// Only letters from this time on: a time, or a span before now such as `2h`
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only letters before this time
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
}

/// A selector whose parts were read.
pub struct Selection {
    /// The topics that it is about.
    pub topics: Vec<String>,
    /// The place within the one topic.
    pub place: Option<LetterRange>,
    /// The rest, in the form that requests take.
    pub filter: DeadLetterProgress,
}

/// A selected letter.
pub struct Found<'a> {
    /// Its topic.
    pub topic: &'a str,
    /// What it says about itself.
    pub letter: Letter<'a>,
    /// The record.
    pub record: Record<'a>,
    /// What was decided about it.
    pub fate: Fate,
    /// The request that decided.
    pub request: Option<String>,
}

impl Selector {
    /// Says whether anything was selected: what changes something needs it.
    pub fn names_letters(&self) -> bool {
        self.topic.is_some() || self.code.is_some()
    }

    /// Reads the parts.
    ///
    /// # Errors
    /// A usage error for an unknown topic, a wrong place or time.
    pub fn read(&self, context: &Context) -> Result<Selection, CliError> {
        self.read_within(context, |topic| parse_letters(topic).is_some())
    }

    /// The same among parking topics.
    ///
    /// # Errors
    /// Those of [`Selector::read`]; a topic of dead letters is unknown here.
    pub fn read_parking(&self, context: &Context) -> Result<Selection, CliError> {
        self.read_within(context, |topic| parse_parking(topic).is_some())
    }

    fn read_within(&self, context: &Context, is_meant: fn(&str) -> bool) -> Result<Selection, CliError> {
        let now = WallClock.now();
        let time = |text: &Option<String>| text.as_deref().map(|t| point_in_time(t, now)).transpose();
        let filter = DeadLetterProgress {
            code: self.code.clone(),
            schema_id: self.schema_id.map(i64::from),
            since: time(&self.since)?,
            until: time(&self.until)?,
            ..DeadLetterProgress::default()
        };
        Ok(Selection { place: self.place()?, topics: self.topics(context, is_meant)?, filter })
    }

    fn topics(&self, context: &Context, is_meant: fn(&str) -> bool) -> Result<Vec<String>, CliError> {
        let existing = Admin::new(&context.kafka())?.topics()?;
        let letters: Vec<String> = existing.into_keys().filter(|t| is_meant(t)).collect();
        match &self.topic {
            None => Ok(letters),
            Some(wanted) if letters.contains(wanted) => Ok(vec![wanted.clone()]),
            Some(wanted) => Err(CliError::usage(unknown_topic(wanted, letters.iter().map(String::as_str)))),
        }
    }

    fn place(&self) -> Result<Option<LetterRange>, CliError> {
        let Some(text) = &self.at else { return Ok(None) };
        if self.topic.is_none() {
            return Err(CliError::usage("`--at` needs `--topic`"));
        }
        let read = || {
            let (partition, offsets) = text.split_once('/')?;
            let partition = partition.parse().ok()?;
            let (first, end) = match offsets.split_once("..") {
                Some((first, end)) => (first.parse().ok()?, end.parse().ok()?),
                None => offsets.parse().ok().map(|offset: i64| (offset, offset.saturating_add(1)))?,
            };
            (0 <= first && first <= end).then_some(LetterRange { partition, first, end })
        };
        let wrong = || format!("`{text}` is no place: write `partition/offset` or `partition/first..end`");
        read().map(Some).ok_or_else(|| CliError::usage(wrong()))
    }
}

impl Selection {
    /// Passes every selected letter until `each` breaks.
    ///
    /// # Errors
    /// Exit code 4 when a topic cannot be read to its end in time.
    pub fn each(
        &self,
        context: &Context,
        mut each: impl FnMut(&Found<'_>) -> ControlFlow<()>,
    ) -> Result<(), CliError> {
        let requests = requests::by_topic(context)?;
        let none = Vec::new();
        for topic in &self.topics {
            let about = requests.get(topic).unwrap_or(&none);
            if self.each_of(context, topic, about, &mut each)?.is_break() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn each_of(
        &self,
        context: &Context,
        topic: &str,
        requests: &[DeadLetterProgress],
        each: &mut impl FnMut(&Found<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, CliError> {
        let (only, begin) = match &self.place {
            Some(place) => (vec![place.partition], Begin::At(place.first)),
            None => (Vec::new(), Begin::Earliest),
        };
        let stop = Stop::AtEnd { within: READ_WITHIN };
        let mut broken = false;
        let mut passed_place = false;
        let read_all = browse(&context.kafka(), topic, &only, begin, stop, &mut |batch| {
            for record in batch.iter() {
                let letter = Letter::of(batch.source.partition, &record);
                let is_elsewhere = |p: &LetterRange| !(p.first..p.end).contains(&record.offset);
                if self.place.as_ref().is_some_and(is_elsewhere) {
                    passed_place |= self.place.as_ref().is_some_and(|p| record.offset >= p.end);
                    continue;
                }
                if !self.filter.selects(&letter) {
                    continue;
                }
                let (fate, request) = fate_of(topic, &letter, requests, REPLAYS_MAX);
                broken = each(&Found { topic, letter, record, fate, request }).is_break();
                if broken {
                    return ControlFlow::Break(());
                }
            }
            if passed_place { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if broken {
            return Ok(ControlFlow::Break(()));
        }
        if !read_all && !passed_place {
            return Err(CliError::unreachable(format!(
                "`{topic}` was not read to its end within {READ_WITHIN:?}; narrow it with `--topic` and \
                 `--at partition/first..end`"
            )));
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// Counts of letters by what was decided about them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fates([u64; 4]);

impl Fates {
    /// Every fate, in the order of the columns.
    pub const ALL: [Fate; 4] = [Fate::Open, Fate::Replayed, Fate::Dropped, Fate::Parked];

    /// Counts one.
    pub fn count(&mut self, fate: Fate) {
        self.0[fate as usize] += 1;
    }

    /// Returns the count of one.
    pub fn of(&self, fate: Fate) -> u64 {
        self.0[fate as usize]
    }

    /// Returns the count of all.
    pub fn sum(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Returns the counts of some by name.
    pub fn by_name(&self, fates: &[Fate]) -> BTreeMap<&'static str, u64> {
        fates.iter().map(|fate| (fate.label(), self.of(*fate))).collect()
    }
}
