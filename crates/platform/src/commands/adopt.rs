//! `throughline groups adopt`: where a group goes on after its offsets stopped to mean what they did: moved
//! by a foreign tool, or counted in a cluster or topic that was replaced. A new, named volume of the books
//! begins there. Decide stages keep their offsets in Kafka, load stages in the database.

use crate::context::Context;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::roles::{stage_specs, store_options, subscription};
use throughline_kafka::admin::{Admin, commit_for_group};
use throughline_model::books::Books;
use throughline_model::record::TopicPartition;
use throughline_model::stage::Kind;
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
}

/// An offset as it stands.
struct Standing {
    partition: TopicPartition,
    next: i64,
    has_books: bool,
    /// Whether it counts in the present cluster and topic.
    is_of_here: bool,
}

/// Shows or does it.
///
/// # Errors
/// Exit code 1 while the group has members, 2 where a decision is missing, 4 when a dependency is away.
pub fn run(context: &Context, adoption: &Adoption) -> Result<Exit, CliError> {
    let group = adoption.group.as_str();
    let kafka = context.kafka();
    let admin = Admin::new(&kafka)?;
    let spec = stage_specs().into_iter().find(|spec| spec.group == group);
    let mut store = match spec.filter(|spec| spec.kind == Kind::Load) {
        None => None,
        Some(spec) => {
            let options = store_options(context, &subscription(&spec, false))?;
            Some(SqlStore::open(&context.config.database.url, options)?)
        }
    };
    let standing = match &mut store {
        None => in_kafka(&admin, group)?,
        Some(store) => in_store(store, group)?,
    };
    let of_topic = |s: &Standing| adoption.topic.as_deref().is_none_or(|topic| *s.partition.topic == *topic);
    let volume = format!("adopted-{}", Uuid::now_v7());
    let standing: Vec<Standing> = standing.into_iter().filter(of_topic).collect();
    let partitions: Vec<TopicPartition> = standing.iter().map(|s| s.partition.clone()).collect();
    let (earliest, latest) = (admin.earliest(&partitions)?, admin.latest(&partitions)?);
    let mut adopted = Vec::new();
    for standing in standing {
        let (Some(first), Some(end)) = (earliest.get(&standing.partition), latest.get(&standing.partition))
        else {
            output::notice(&format!("{} does not exist any more and is left alone", standing.partition));
            continue;
        };
        if let Some(to) = destination(adoption.begin, &standing, *first, *end)? {
            let books = Books::open(volume.clone());
            adopted.push(Advance { partition: standing.partition, from: standing.next, to, books });
        }
    }
    if adopted.is_empty() {
        output::line(&format!(
            "every offset of `{group}` counts here and carries its books: nothing to adopt"
        ));
        return Ok(Exit::Done);
    }
    for Advance { partition, from, to, .. } in &adopted {
        output::line(&format!("{partition} goes on at {to} (it stands at {from}) in volume {volume}"));
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
        for advance in &adopted {
            store.adopt(group, &advance.partition, advance.to, &volume)?;
        }
    }
    // Of a load stage Kafka holds a copy for lag tools.
    commit_for_group(&kafka, group, &adopted)?;
    Ok(Exit::Done)
}

/// Returns where an offset goes on, or `None` where it may stay as it is.
fn destination(
    begin: Option<Begin>,
    standing: &Standing,
    first: i64,
    end: i64,
) -> Result<Option<i64>, CliError> {
    let lies_within = (first..=end).contains(&standing.next);
    match begin {
        Some(Begin::Earliest) => Ok(Some(first)),
        Some(Begin::End) => Ok(Some(end)),
        None if standing.is_of_here && standing.has_books && standing.next <= end => Ok(None),
        None if standing.is_of_here && lies_within => Ok(Some(standing.next)),
        None => Err(CliError::usage(format!(
            "{} stands at {}, which says nothing about the records from {first} to {end} that are there now: \
             decide with `--begin earliest` (nothing is skipped, repeats are possible) or `--begin end`",
            standing.partition, standing.next
        ))),
    }
}

fn in_kafka(admin: &Admin, group: &str) -> Result<Vec<Standing>, CliError> {
    let offsets = admin.group_offsets(&[group])?.into_iter().flat_map(|g| g.offsets);
    let standing = |o: throughline_kafka::admin::CommittedOffset| Standing {
        has_books: Books::from_metadata(&o.metadata).is_ok(),
        partition: o.partition,
        next: o.next,
        is_of_here: true,
    };
    Ok(offsets.map(standing).collect())
}

fn in_store(store: &mut SqlStore, group: &str) -> Result<Vec<Standing>, CliError> {
    let mut all = Vec::new();
    for stored in store.stored_offsets(group)? {
        all.push(Standing {
            has_books: Books::from_metadata(&stored.books).is_ok(),
            is_of_here: store.is_of_here(&stored),
            partition: stored.partition,
            next: stored.next,
        });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_stays_moves_or_asks_for_a_decision() {
        let at = |next, has_books, is_of_here| Standing {
            partition: TopicPartition::new("device.telemetry.v1", 0),
            next,
            has_books,
            is_of_here,
        };
        for (standing, begin, expected) in [
            (at(50, true, true), None, Some(None)),
            (at(5, true, true), None, Some(None)), // Overtaken: the stage says so itself.
            (at(50, false, true), None, Some(Some(50))),
            (at(150, true, true), None, None),
            (at(50, true, false), None, None),
            (at(150, true, true), Some(Begin::End), Some(Some(100))),
            (at(50, true, false), Some(Begin::Earliest), Some(Some(10))),
        ] {
            let found = destination(begin, &standing, 10, 100);
            assert_eq!(found.ok(), expected, "{} {}", standing.next, standing.is_of_here);
        }
    }
}
