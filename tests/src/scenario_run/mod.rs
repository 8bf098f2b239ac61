//! Runs scenarios: the same file against the cluster in memory in virtual time and against a real Kafka.
//!
//! A scenario says what arrives and what must come of it; nothing in it says when a batch ends or a commit
//! falls, so a stage that gives other results on the two worlds shows that a port in memory lies.

mod compare;
mod input;
mod kafka;
mod killable;
mod memory;
mod world;

pub use kafka::KafkaWorld;
pub use memory::MemoryWorld;
pub use world::{Found, World};

use killable::{KillSwitch, Killable};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use throughline_model::books::Books;
use throughline_model::catalog::{dlt_topic, replay_topic};
use throughline_model::outcome::Outcome;
use throughline_model::record::{Outbox, TopicPartition};
use throughline_model::stage::{Decide, StageSpec};
use throughline_model::time::Timestamp;
use throughline_model::topics::SERVICE_PLATFORM_RULE_V1;
use throughline_runtime::{DecideLoop, DecidePorts, LoopConfig};
use throughline_stages::bridge_data::{self, BridgeData};
use throughline_stages::evaluate_rules::{self, EvaluateRules};
use throughline_stages::update_twin::{self, UpdateTwin};
use throughline_telemetry::Health;
use throughline_testkit::KILLED;
use throughline_testkit::scenario::{Scenario, Step, parse};

/// How long a stage may take to settle what arrived, by the world's clock: longer than any rebalance.
const PATIENCE: Duration = Duration::from_secs(60);

/// Returns the scenario files, by name.
///
/// # Panics
/// When the directory cannot be read.
pub fn files() -> Vec<PathBuf> {
    let directory = crate::root().join("tests/scenarios");
    let listed = std::fs::read_dir(&directory).expect("tests/scenarios can be read");
    let mut files: Vec<PathBuf> = listed.map(|entry| entry.expect("a directory entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "yaml"));
    files.sort();
    files
}

/// Reads a scenario file.
///
/// # Errors
/// What is wrong, with file, line and column.
pub fn read(path: &Path) -> Result<Scenario, String> {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let text = std::fs::read_to_string(path).map_err(|e| format!("{file}: {e}"))?;
    parse(&file, &text).map_err(|e| e.to_string())
}

/// Runs a file and compares what came of it.
///
/// # Errors
/// One line for each difference: file, world, step, what was expected and what was found.
pub fn run<W: World>(world: &mut W, path: &Path) -> Result<(), String> {
    let scenario = read(path)?;
    match scenario.stage.as_str() {
        evaluate_rules::STAGE => Run::new(world, path, &scenario, EvaluateRules::new).go(),
        update_twin::STAGE => Run::new(world, path, &scenario, UpdateTwin::default).go(),
        bridge_data::STAGE => Run::new(world, path, &scenario, BridgeData::default).go(),
        other => Err(format!(
            "{}: `{other}` is no decide stage; these are: {}, {}, {}",
            path.display(),
            evaluate_rules::STAGE,
            update_twin::STAGE,
            bridge_data::STAGE
        )),
    }
}

type Loop<W, D> = DecideLoop<
    D,
    <W as World>::Source,
    Killable<<W as World>::Transactions>,
    <W as World>::Tables,
    <W as World>::Schemas,
>;

struct Run<'a, W: World, D: Decide> {
    world: &'a mut W,
    scenario: &'a Scenario,
    make: fn() -> D,
    spec: StageSpec,
    /// The file's name without its extension, which is the site of all devices.
    site: String,
    /// Where the run is, for messages.
    step: String,
    running: Option<Loop<W, D>>,
    health: Health,
    kill: KillSwitch,
    /// Versions of the rules that were put in force.
    rules: BTreeMap<String, i64>,
    /// The positions to be committed until everything that arrived is settled.
    due: Option<Vec<(TopicPartition, i64)>>,
}

impl<'a, W: World, D: Decide> Run<'a, W, D> {
    fn new(world: &'a mut W, path: &Path, scenario: &'a Scenario, make: fn() -> D) -> Self {
        let site = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Self {
            world,
            scenario,
            make,
            spec: make().spec().clone(),
            site,
            step: String::new(),
            running: None,
            health: Health::new(),
            kill: KillSwitch::default(),
            rules: BTreeMap::new(),
            due: None,
        }
    }

    fn go(mut self) -> Result<(), String> {
        let done = self.play();
        // The next scenario on this Kafka begins without rules, whatever became of this one.
        let withdrawn = input::withdrawn(self.rules.keys());
        let withdrawn = self.world.append(&withdrawn).map_err(|e| self.found("no rules left behind", e));
        done.and(withdrawn)
    }

    fn play(&mut self) -> Result<(), String> {
        self.step = "before the steps".to_owned();
        self.start()?;
        // What other scenarios left in the inputs is settled before anything is counted.
        self.settle()?;
        let before = self.outcomes()?;
        let scenario = self.scenario;
        for rule in &scenario.rules {
            self.put_rule(rule)?;
        }
        self.wait_for_rules()?;
        for (number, step) in (1..).zip(&scenario.steps) {
            self.step = format!("step {number}, {}", name_of(step));
            self.take(step)?;
        }
        self.step = "after the steps".to_owned();
        self.settle()?;
        if let Some(running) = self.running.take() {
            running.drain().map_err(|e| self.found("an orderly end", e))?;
        }
        self.compare(&before)
    }

    /// Says what was expected at this step and what was found.
    fn found(&self, expected: impl std::fmt::Display, found: impl std::fmt::Display) -> String {
        let (site, world, step) = (&self.site, self.world.name(), &self.step);
        format!("{site}.yaml {world}, {step}: expected {expected}, found {found}")
    }

    fn take(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Message(message) => {
                let made = input::message(&self.world.codec(), &self.site, message, self.now());
                self.arrive(made)
            }
            Step::Garbage(garbage) => self.arrive(input::garbage(&self.site, garbage)),
            Step::Request(request) => {
                let made = input::request(&self.world.codec(), &self.site, request, self.now());
                self.arrive(made)
            }
            Step::Wait(seconds) => {
                self.settle()?;
                let until = self.now().plus(Duration::from_secs_f64(seconds.max(0.0)));
                while self.now() < until {
                    self.turn()?;
                }
                Ok(())
            }
            Step::Kill => self.kill(),
            Step::Rule(rule) => {
                self.settle()?;
                self.put_rule(rule)?;
                self.wait_for_rules()
            }
        }
    }

    fn arrive(&mut self, made: Result<Outbox, String>) -> Result<(), String> {
        let records = made.map_err(|e| self.found("a step that can be carried out", e))?;
        self.append(&records)?;
        self.due = None;
        // The stage works while more arrives, so that batches end here and there.
        self.turn()
    }

    fn append(&mut self, records: &Outbox) -> Result<(), String> {
        self.world.append(records).map_err(|e| self.found("an acknowledgement", e))
    }

    // ---- the process -----------------------------------------------------------------------------------

    fn start(&mut self) -> Result<(), String> {
        let inputs = self.spec.inputs.iter().map(|input| (*input).to_owned());
        let replays = self.spec.inputs.iter().map(|input| replay_topic(input, self.spec.group));
        let topics: Vec<String> = inputs.chain(replays).collect();
        let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
        let joined = self.world.join(self.spec.group, &topics);
        let (source, transactions) = joined.map_err(|e| self.found("a member of the group", e))?;
        self.kill = KillSwitch::default();
        let ports = DecidePorts {
            source,
            transactions: Killable::new(transactions, self.kill.clone()),
            tables: self.world.tables(),
            schemas: self.world.schemas(),
            incarnation: self.world.ask_incarnation(&topics, self.spec.changelog.as_deref()),
            codec: self.world.codec(),
            clock: self.world.clock(),
        };
        self.health = Health::new();
        let role = self.health.role(self.spec.group);
        self.running = Some(DecideLoop::new((self.make)(), ports, LoopConfig::default(), role));
        Ok(())
    }

    /// Takes one turn; says whether the process was killed in it.
    fn turn_or_die(&mut self) -> Result<bool, String> {
        let running = self.running.as_mut().expect("the stage runs from the start to the end of the steps");
        match running.turn() {
            Ok(()) => Ok(false),
            Err(stopped) if stopped.code == KILLED => Ok(true),
            Err(stopped) => Err(self.found("a stage that runs", stopped)),
        }
    }

    fn turn(&mut self) -> Result<(), String> {
        self.turn_or_die().map(drop)
    }

    fn kill(&mut self) -> Result<(), String> {
        self.kill.arm();
        let deadline = self.now().plus(PATIENCE);
        while !self.turn_or_die()? && !self.is_settled()? {
            self.check_patience(deadline, "a commit to be killed at")?;
        }
        drop(self.running.take());
        self.start()
    }

    /// Turns until everything that arrived is committed.
    fn settle(&mut self) -> Result<(), String> {
        let deadline = self.now().plus(PATIENCE);
        while !self.is_settled()? {
            self.turn()?;
            self.check_patience(deadline, "every record to be settled")?;
        }
        Ok(())
    }

    fn is_settled(&mut self) -> Result<bool, String> {
        if self.due.is_none() {
            let mut due = Vec::new();
            for input in &self.spec.inputs {
                due.extend(self.world.ends(input).map_err(|e| self.found("ends of the inputs", e))?);
            }
            due.retain(|(_, end)| *end > 0);
            self.due = Some(due);
        }
        let committed = self.world.committed(self.spec.group);
        let committed = committed.map_err(|e| self.found("committed offsets", e))?;
        let is_passed = |(at, end): &(TopicPartition, i64)| committed.get(at).is_some_and(|(o, _)| o >= end);
        Ok(self.due.iter().flatten().all(is_passed))
    }

    fn check_patience(&self, deadline: Timestamp, what: &str) -> Result<(), String> {
        if self.now() < deadline {
            return Ok(());
        }
        let status = self.health.status();
        Err(self.found(format!("{what} within {PATIENCE:?}"), &status["roles"][self.spec.group]))
    }

    fn now(&self) -> Timestamp {
        self.world.clock().now()
    }

    // ---- rules -----------------------------------------------------------------------------------------

    fn put_rule(&mut self, rule: &Value) -> Result<(), String> {
        let id = rule["id"].as_str().unwrap_or_default().to_owned();
        let version = self.rules.get(&id).map_or(1, |version| version + 1);
        let made = input::rule(&self.world.codec(), rule, version, self.now());
        let records = made.map_err(|e| self.found("a rule that can be put in force", e))?;
        self.append(&records)?;
        self.rules.insert(id, version);
        Ok(())
    }

    /// Turns until the stage has taken every rule, as `throughline rules apply` waits for it.
    fn wait_for_rules(&mut self) -> Result<(), String> {
        if !self.spec.tables.contains(&SERVICE_PLATFORM_RULE_V1) {
            return Ok(());
        }
        let ends = self.world.ends(SERVICE_PLATFORM_RULE_V1).map_err(|e| self.found("the rules' end", e))?;
        let deadline = self.now().plus(PATIENCE);
        loop {
            let status = self.health.status();
            let taken = &status["roles"][self.spec.group]["notes"]["tables"];
            if ends.iter().all(|(at, end)| taken[at.to_string()].as_i64().unwrap_or(0) >= *end) {
                return Ok(());
            }
            self.turn()?;
            self.check_patience(deadline, "the rule to be taken")?;
        }
    }

    // ---- what came of it -------------------------------------------------------------------------------

    /// Returns the cumulative outcomes of the group. Another scenario on the same Kafka left some there, so
    /// what counts is the difference.
    fn outcomes(&self) -> Result<[u64; 6], String> {
        let committed = self.world.committed(self.spec.group);
        let committed = committed.map_err(|e| self.found("committed offsets", e))?;
        let mut sum = [0; 6];
        for (at, (_, metadata)) in committed {
            let books = Books::from_metadata(&metadata);
            let books = books.map_err(|e| self.found(format!("the books of {at}"), e))?;
            for (sum, n) in sum.iter_mut().zip(books.counts) {
                *sum += n;
            }
        }
        Ok(sum)
    }

    fn compare(&mut self, before: &[u64; 6]) -> Result<(), String> {
        let mut differences = Vec::new();
        let after = self.outcomes()?;
        let scenario = self.scenario;
        self.step = "expect.outcomes".to_owned();
        let mut outcomes = BTreeMap::new();
        for outcome in Outcome::ALL {
            let count = after[outcome.index()] - before[outcome.index()];
            outcomes.extend((count > 0).then(|| (outcome.label().to_owned(), count)));
        }
        if outcomes != scenario.expect.outcomes {
            differences.push(
                self.found(format_args!("{:?}", scenario.expect.outcomes), format_args!("{outcomes:?}")),
            );
        }
        for (topic, expected) in &scenario.expect.records {
            let found = self.of_this_site(topic)?;
            let found = compare::in_order(found, self.world.is_compacted(topic), &self.world.codec());
            for (place, expected, found) in compare::records(expected, &found) {
                self.step = format!("expect.records of {topic}{place}");
                differences.push(self.found(expected, found));
            }
        }
        self.step = "expect.dead_letters".to_owned();
        let mut letters = BTreeMap::new();
        for input in &self.spec.inputs {
            for letter in self.of_this_site(&dlt_topic(input, self.spec.group))? {
                *letters.entry(letter.reason.unwrap_or_default()).or_default() += 1;
            }
        }
        if letters != scenario.expect.dead_letters {
            let expected = format!("{:?}", scenario.expect.dead_letters);
            differences.push(self.found(expected, format_args!("{letters:?}")));
        }
        if differences.is_empty() { Ok(()) } else { Err(differences.join("\n")) }
    }

    fn of_this_site(&self, topic: &str) -> Result<Vec<Found>, String> {
        let mut found =
            self.world.records(topic).map_err(|e| self.found(format!("records of {topic}"), e))?;
        let prefix = format!("{}/", self.site);
        found.retain(|record| record.key.starts_with(&prefix));
        Ok(found)
    }
}

fn name_of(step: &Step) -> String {
    match step {
        Step::Message(m) => format!("message of {} seq {:?}", m.device, m.seq),
        Step::Garbage(g) => format!("garbage of {}", g.key),
        Step::Request(r) => format!("request for {}", r.device),
        Step::Wait(seconds) => format!("wait of {seconds} s"),
        Step::Kill => "kill".to_owned(),
        Step::Rule(rule) => format!("rule {}", rule["id"]),
    }
}
