//! `throughline policy`: what each stage does about each failure, from the table that the loops use.

use crate::config::Flags;
use crate::failure::{CliError, Exit};
use crate::output;
use crate::roles::stage_specs;
use serde_json::{Value, json};
use throughline_model::stage::Kind;
use throughline_model::strict_toml::suggestion;
use throughline_runtime::policy::{RETRY_LEAST, RETRY_MOST, RULES, Rule};
use throughline_store::FAILURE_CLASSES;

/// Arguments of `policy`.
#[derive(clap::Args)]
pub struct Args {
    /// The stage; without it the policy of every kind of stage is printed
    stage: Option<String>,
}

/// Prints the policy and which errors of a database belong to which class.
///
/// # Errors
/// A usage error that names the known stages.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let stages = stage_specs();
    let kind = match &args.stage {
        None => None,
        Some(wanted) => match stages.iter().find(|stage| stage.group == wanted) {
            Some(stage) => Some(stage.kind),
            None => {
                let known = stages.iter().map(|stage| stage.group);
                return Err(CliError::usage(unknown_stage(wanted, known)));
            }
        },
    };
    let rules = || RULES.iter().filter(|rule| kind.is_none_or(|kind| rule.kinds.contains(&kind)));
    // Only load stages have a database.
    let classes = if matches!(kind, Some(Kind::Decide | Kind::Act)) { &[][..] } else { FAILURE_CLASSES };
    if flags.json {
        let classes = classes.iter().map(
            |line| json!({"codes": line.codes.to_string(), "class": line.class.label(), "what": line.what}),
        );
        let stages = stages.iter().map(|stage| json!({"stage": stage.group, "kind": name_of(stage.kind)}));
        let document = json!({"stages": stages.collect::<Vec<_>>(), "rules": rules().map(to_json).collect::<Vec<_>>(),
            "database": classes.collect::<Vec<_>>(), "retry_least_ms": RETRY_LEAST.as_millis() as u64,
            "retry_most_ms": RETRY_MOST.as_millis() as u64});
        output::json("policy", document);
        return Ok(Exit::Done);
    }
    rules().for_each(print);
    output::line(&format!(
        "`pause` and `begin again` are tried again after {} ms, doubling to {} s, for ever.",
        RETRY_LEAST.as_millis(),
        RETRY_MOST.as_secs()
    ));
    if !classes.is_empty() {
        output::line("\nErrors of the database; any other stops the stage.\n");
        let rows: Vec<Vec<String>> = classes
            .iter()
            .map(|line| vec![line.class.label().to_owned(), line.codes.to_string(), line.what.to_owned()])
            .collect();
        output::table(&["CLASS", "CODES", "WHAT"], &rows);
    }
    Ok(Exit::Done)
}

fn unknown_stage<'a>(wanted: &str, known: impl Iterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.collect();
    let hint = suggestion(wanted, known.iter().copied());
    format!("there is no stage `{wanted}`{hint} (known: {})", known.join(", "))
}

const fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Decide => "decide",
        Kind::Load => "load",
        Kind::Act => "act",
    }
}

fn kinds(rule: &Rule) -> Vec<&'static str> {
    rule.kinds.iter().map(|kind| name_of(*kind)).collect()
}

fn steps(rule: &Rule) -> Vec<&'static str> {
    rule.steps.iter().map(|step| step.label()).collect()
}

fn classes(rule: &Rule) -> Vec<&'static str> {
    rule.classes.iter().map(|class| class.label()).collect()
}

fn to_json(rule: &Rule) -> Value {
    json!({"kinds": kinds(rule), "steps": steps(rule), "classes": classes(rule),
           "response": rule.response.label(), "retried": rule.response.is_retried(),
           "when": rule.when, "then": rule.then, "shows": rule.shows})
}

fn print(rule: &Rule) {
    let kinds = kinds(rule).join(", ");
    let (steps, classes) = (steps(rule).join(", "), classes(rule).join(", "));
    output::line(&format!("{classes} in {steps} ({kinds}): {}", rule.response.label()));
    for (name, text) in [("when", rule.when), ("then", rule.then), ("shown by", rule.shows)] {
        output::line(&format!("  {name:8}  {text}"));
    }
    output::line("");
}
