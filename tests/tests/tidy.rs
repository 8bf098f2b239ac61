//! What must agree in the repository: walls between crates, names, files, words.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use throughline_tests::chaos::journal;
use throughline_tests::{binary, root, scenario_run, succeed};

fn tracked_files() -> Vec<PathBuf> {
    let listed =
        Command::new("git").args(["ls-files", "-co", "--exclude-standard"]).current_dir(root()).output();
    let listed = listed.expect("git lists the files");
    assert!(listed.status.success(), "git ls-files fails: {}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout).expect("file names are UTF-8");
    names.lines().map(|name| root().join(name)).filter(|path| path.is_file()).collect()
}

fn text_of(path: &PathBuf) -> Option<String> {
    std::fs::read(path).ok().and_then(|bytes| String::from_utf8(bytes).ok())
}

/// The crates that alone may use a client library.
const WALLS: [(&str, &[&str]); 9] = [
    ("rdkafka", &["throughline-kafka", "throughline-kafka-ffi"]),
    ("rdkafka-sys", &["throughline-kafka-ffi"]),
    ("sqlx", &["throughline-store"]),
    ("mqtt-protocol-core", &["throughline-mqtt"]),
    ("rumqttc", &["throughline-mqtt"]),
    ("clap", &["throughline-platform"]),
    ("anyhow", &["throughline-platform"]),
    ("apache-avro", &["throughline-local", "throughline-model"]),
    ("opentelemetry", &["throughline-telemetry"]),
];

/// What each crate of ours may build on, tests aside.
const LAYERS: [(&str, &[&str]); 9] = [
    ("model", &[]),
    ("stages", &["model"]),
    ("telemetry", &[]),
    ("runtime", &["model", "telemetry"]),
    ("mqtt", &["model", "runtime", "telemetry"]),
    ("kafka-ffi", &[]),
    ("kafka", &["model", "runtime", "telemetry", "kafka-ffi"]),
    ("store", &["model", "runtime", "telemetry"]),
    ("local", &["model", "kafka", "telemetry", "runtime"]),
];

fn packages() -> Vec<Value> {
    let manifest = root().join("Cargo.toml").display().to_string();
    let args = ["metadata", "--format-version", "1", "--no-deps", "--offline", "--manifest-path", &manifest];
    let metadata: Value = serde_json::from_str(&succeed("cargo", &args)).expect("cargo metadata is JSON");
    metadata["packages"].as_array().expect("metadata lists packages").clone()
}

fn dependencies(package: &Value, with_dev: bool) -> BTreeSet<String> {
    let list = package["dependencies"].as_array().expect("a package lists its dependencies");
    let wanted = list.iter().filter(|d| with_dev || d["kind"] != "dev");
    wanted.filter_map(|d| d["name"].as_str().map(str::to_owned)).collect()
}

#[test]
fn client_libraries_are_used_by_their_adapters_only() {
    for package in packages() {
        let name = package["name"].as_str().expect("a package has a name");
        for library in dependencies(&package, false) {
            if let Some((_, users)) = WALLS.iter().find(|(wall, _)| *wall == library) {
                assert!(
                    users.contains(&name),
                    "`{name}` depends on `{library}`, which is for {users:?} only"
                );
            }
        }
    }
}

#[test]
fn crates_build_only_on_the_layers_below_them() {
    for package in packages() {
        let name = package["name"]
            .as_str()
            .expect("a package has a name")
            .trim_start_matches("throughline-")
            .to_owned();
        let Some((_, allowed)) = LAYERS.iter().find(|(layer, _)| *layer == name) else { continue };
        for dependency in dependencies(&package, false) {
            if let Some(ours) = dependency.strip_prefix("throughline-") {
                assert!(
                    allowed.contains(&ours),
                    "`{name}` depends on `{ours}`; it may depend on {allowed:?}"
                );
            }
        }
    }
}

#[test]
fn topic_names_are_spelled_in_the_catalog_only() {
    let names: Vec<String> = throughline_model::topics::TOPIC_FILES
        .iter()
        .map(|(file, _)| file.trim_end_matches(".toml").to_owned())
        .collect();
    for path in tracked_files() {
        let shown = path.display().to_string();
        let is_code = shown.contains("/crates/") && shown.contains("/src/") && shown.ends_with(".rs");
        if !is_code {
            continue;
        }
        let text = text_of(&path).unwrap_or_default();
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (number, line) in code.lines().enumerate() {
            let quoted = names.iter().find(|name| line.contains(&format!("\"{name}\"")));
            let prose = line.trim_start().starts_with("//");
            assert!(
                quoted.is_none() || prose,
                "{shown}:{}: spell `{}` as its handle",
                number + 1,
                quoted.expect("some")
            );
        }
    }
}

/// Returns the words in backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_bound_is_shown_by_tests_that_exist() {
    let sources: Vec<String> = tracked_files()
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "rs"))
        .filter_map(text_of)
        .collect();
    let page = text_of(&root().join("docs/bounds.md")).expect("the page is there");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| ")).collect();
    assert!(rows.len() > 30, "the table has {} rows", rows.len());
    let columns = rows[0].split(" | ").count();
    for row in &rows[1..] {
        assert_eq!(row.split(" | ").count(), columns, "columns of: {row}");
        let tests = row.trim_end_matches(" |").rsplit(" | ").next().unwrap_or_default();
        assert!(quoted(tests).next().is_some(), "no test is named in: {row}");
        for name in quoted(tests) {
            let is_there = sources.iter().any(|text| text.contains(&format!("fn {name}(")));
            assert!(is_there, "docs/bounds.md names the test `{name}`, which does not exist");
        }
    }
}

#[test]
fn every_metric_is_set_somewhere() {
    let names = text_of(&root().join("crates/telemetry/src/names.rs")).expect("the list is there");
    let (_, table) = names.split_once("\nmetrics! {").expect("the list is a macro");
    let is_kind = |word: &str| ["Counter,", "Gauge,", "Histogram(WORK),", "Histogram(AGE),"].contains(&word);
    let listed: Vec<&str> = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.len() > 1 && is_kind(words[1]))
        .map(|words| words[0])
        .collect();
    assert!(listed.len() > 30, "{listed:?}");
    // What the tests of a file set does not count; the registry of metrics sets one by itself.
    let code: String = tracked_files()
        .iter()
        .filter(|path| path.display().to_string().contains("/crates/") && !path.ends_with("names.rs"))
        .filter(|path| path.display().to_string().contains("/src/"))
        .filter_map(text_of)
        .map(|text| text.split("#[cfg(test)]").next().unwrap_or_default().to_owned())
        .collect();
    for metric in listed {
        let word = |after: &str| !after.starts_with(|c: char| c.is_alphanumeric());
        let is_set = code.split(&format!("Metric::{metric}")).skip(1).any(word);
        assert!(is_set, "nothing sets `Metric::{metric}`: set it or take it out of names.rs");
    }
}

#[test]
fn every_decide_stage_has_a_scenario() {
    let told: BTreeSet<String> = scenario_run::files()
        .iter()
        .map(|file| scenario_run::read(file).unwrap_or_else(|e| panic!("{e}")).stage)
        .collect();
    let mut decides = BTreeSet::new();
    for path in tracked_files() {
        let is_stage = path.parent().is_some_and(|directory| directory.ends_with("crates/stages/src"));
        if is_stage && text_of(&path).is_some_and(|text| text.contains("impl Decide for ")) {
            decides.insert(path.file_stem().expect("a module has a name").to_string_lossy().into_owned());
        }
    }
    assert!(!decides.is_empty(), "crates/stages has decide stages");
    assert_eq!(told, decides, "the stages of tests/scenarios are the decide stages, none left out");
}

#[test]
fn the_codes_of_dead_letters_are_listed() {
    let listed = throughline_model::dead_letter::CODES;
    // A record of a table that is not taken is logged, not dead-lettered.
    let of_tables = ["rule_key_mismatch"];
    let mut texts = String::new();
    for path in tracked_files() {
        let shown = path.display().to_string();
        let of_stages = ["model", "stages", "mqtt", "store"].map(|owner| format!("/crates/{owner}/src/"));
        let is_code = shown.ends_with(".rs") && of_stages.iter().any(|place| shown.contains(place));
        if !is_code || shown.contains("tests") || shown.ends_with("dead_letter/codes.rs") {
            continue;
        }
        let text = text_of(&path).unwrap_or_default();
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for made in ["dead_lettered(", "Reject::new("] {
            for rest in code.split(made).skip(1) {
                let literal = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split('"').next());
                if let Some(code) = literal.filter(|code| !code.is_empty() && !of_tables.contains(code)) {
                    assert!(listed.contains(&code), "{shown}: `{code}` is missing in dead_letter/codes.rs");
                }
            }
        }
        texts.push_str(code);
    }
    for code in listed {
        assert!(texts.contains(&format!("\"{code}\"")), "no dead letter has the code `{code}`");
    }
}

/// The documents' tables about failures are generated: `UPDATE_DOCS=1 cargo test -p throughline-tests --test tidy`
/// writes them.
#[test]
fn the_documented_policy_is_the_one_that_the_loops_use() {
    let printed = succeed(binary(), &["policy", "--json"]);
    let policy: Value = serde_json::from_str(&printed).expect("it prints JSON");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let list =
        |value: &Value| value.as_array().expect("a list").iter().map(text).collect::<Vec<_>>().join(", ");
    let mut rules = String::from(
        "| stages | step | class | what is done | when | then | shown by |\n|---|---|---|---|---|---|---|\n",
    );
    for rule in policy["rules"].as_array().expect("rules") {
        let (kinds, steps, classes) = (list(&rule["kinds"]), list(&rule["steps"]), list(&rule["classes"]));
        let named = ["response", "when", "then", "shows"].map(|name| text(&rule[name])).join(" | ");
        rules.push_str(&format!("| {kinds} | {steps} | {classes} | {named} |\n"));
    }
    let mut codes = String::from("| class | codes | what |\n|---|---|---|\n");
    for line in policy["database"].as_array().expect("codes") {
        let cells = ["class", "codes", "what"].map(|name| text(&line[name])).join(" | ");
        codes.push_str(&format!("| {cells} |\n"));
    }
    check_table("docs/operations.md", &rules);
    check_table("docs/operations-database.md", &codes);
}

/// Compares the table between the marks of a document, or writes it where that is asked for.
fn check_table(document: &str, expected: &str) {
    let path = root().join(document);
    let page = text_of(&path).expect("the document is there");
    let (begin, end) = ("<!-- table: generated -->\n", "<!-- end of table -->");
    let (before, rest) = page.split_once(begin).expect("the document has the mark where the table begins");
    let (table, after) = rest.split_once(end).expect("the document has the mark where the table ends");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let written = std::fs::write(&path, format!("{before}{begin}{expected}{end}{after}"));
        written.expect("the document can be written");
        return;
    }
    assert!(
        table == expected,
        "{document} differs from the code; write it with `UPDATE_DOCS=1 cargo test -p throughline-tests --test \
         tidy`; it shall be:\n{expected}"
    );
}

#[test]
fn no_file_is_large_and_none_names_this_machine() {
    let here = root().parent().map(|p| format!("{}/", p.display())).filter(|p| p.len() > 2);
    for path in tracked_files() {
        let shown = path.display();
        let size = std::fs::metadata(&path).map(|m| m.len()).unwrap_or_default();
        assert!(size <= 1 << 20, "{shown} has {size} bytes; at most 1 MiB");
        let Some(text) = text_of(&path) else { continue };
        if let Some(here) = here.as_deref().filter(|h| *h != "/") {
            assert!(!text.contains(here), "{shown} names a path of this machine");
        }
    }
}

#[test]
fn no_debugging_code_is_left() {
    let forgotten = ["todo!(", "unimplemented!(", "dbg!(", "#[ignore", "FIX\u{4d}E", "XX\u{58}"];
    for path in tracked_files() {
        let shown = path.display().to_string();
        if !shown.ends_with(".rs") || shown.ends_with("tests/tests/tidy.rs") {
            continue;
        }
        let text = text_of(&path).unwrap_or_default();
        for word in forgotten {
            assert!(!text.contains(word), "{shown} has `{word}`");
        }
    }
}

#[test]
fn links_of_the_documents_lead_somewhere() {
    for path in tracked_files() {
        if path.extension().is_none_or(|e| e != "md") {
            continue;
        }
        let text = text_of(&path).unwrap_or_default();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            let place = path.parent().expect("a file has a directory").join(file);
            assert!(place.exists(), "{} links to `{target}`, which does not exist", path.display());
        }
    }
}

/// The page says what the journal says, nothing else; a note that a person adds to a run comes into it with
/// `UPDATE_DOCS=1` as above.
#[test]
fn the_page_of_long_runs_is_made_of_their_journal() {
    let page = journal::page(&journal::entries(), &journal::sabotaged());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(journal::page_file(), &page).expect("docs/ is writable");
    }
    let found = std::fs::read_to_string(journal::page_file()).expect("docs/reliability.md is there");
    assert!(
        found == page,
        "docs/reliability.md is not what its journal makes; write it with `UPDATE_DOCS=1 cargo test -p \
         throughline-tests --test tidy`"
    );
}
