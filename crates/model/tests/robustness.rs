//! Files that people write never panic their readers, however broken.

use proptest::prelude::*;
use throughline_model::catalog::{Catalog, Filter, TopicName, TopicSpec};
use throughline_model::strict_toml::{self, FileError};
use throughline_model::topics::{SCHEMA_FILES, TOPIC_FILES};

/// A sound text with a piece replaced by something else, or any text at all.
fn broken(files: &'static [(&'static str, &'static str)]) -> impl Strategy<Value = (String, String)> {
    let damage = prop_oneof![
        any::<String>(),
        Just(String::new()),
        "[\\[\\]{}\"'=.,:#\\n a-z0-9]{0,12}",
        Just("[".repeat(400)),
        Just("(".repeat(400)),
        Just("{\"type\":".repeat(200)),
    ];
    (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0usize..40, damage, any::<bool>()).prop_map(
        move |(file, at, len, damage, whole)| {
            let (name, text) = files[file.index(files.len())];
            if whole {
                return (name.to_owned(), damage);
            }
            let floor = |mut i: usize| {
                i = i.min(text.len());
                while !text.is_char_boundary(i) {
                    i -= 1;
                }
                i
            };
            let start = floor(at.index(text.len()));
            let end = floor(start + len).max(start);
            (name.to_owned(), format!("{}{damage}{}", &text[..start], &text[end..]))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_broken_topic_file_is_an_error_with_a_place_in_it((name, text) in broken(TOPIC_FILES)) {
        if let Err(fault) = strict_toml::parse::<TopicSpec>(&name, &text) {
            check_place(&fault, &text)?;
        }
        if let Err(faults) = Catalog::parse(&[(name.as_str(), text.as_str())], SCHEMA_FILES) {
            for fault in faults.iter().filter(|f| f.file == name) {
                check_place(fault, &text)?;
            }
        }
    }

    #[test]
    fn a_broken_schema_is_an_error((name, text) in broken(SCHEMA_FILES)) {
        let topic = name.replace(".avsc", ".toml");
        let topic = TOPIC_FILES.iter().find(|(n, _)| *n == topic).expect("beside it");
        let _ = Catalog::parse(&[*topic], &[(name.as_str(), text.as_str())]);
    }

    #[test]
    fn an_expression_of_any_form_is_read_or_refused(text in "\\PC{0,80}", nested in 0usize..600) {
        let text = format!("{}{text}", "(".repeat(nested));
        let quoted = toml_string(&text);
        let file = format!(
            "name = \"device.x.v1\"\nsummary = \"X.\"\nowner = \"x\"\nkey = \"site/device\"\nschema = \"device.telemetry.v1.avsc\"\npartitions = 1\ncleanup = \"delete\"\nretention = \"1d\"\n[[feed]]\nname = \"x\"\nfilter = \"x/{{device}}\"\ndecoder = \"json\"\nsite = {quoted}\n"
        );
        let _ = Catalog::parse(&[("device.x.v1.toml", file.as_str())], SCHEMA_FILES);
    }

    #[test]
    fn names_and_filters_of_any_form_are_read_or_refused(text in any::<String>(), topic in any::<String>()) {
        if let Ok(name) = text.parse::<TopicName>() {
            prop_assert_eq!(name.as_str(), &text);
        }
        if let Ok(filter) = text.parse::<Filter>() {
            let mut captured = Vec::new();
            filter.capture(&topic, &mut captured);
        }
    }
}

fn check_place(fault: &FileError, text: &str) -> Result<(), TestCaseError> {
    prop_assert!(fault.line >= 1 && fault.line <= text.matches('\n').count() + 1, "{}", fault);
    prop_assert!(fault.column >= 1 && !fault.what.is_empty() && !fault.what.contains('\n'), "{}", fault);
    Ok(())
}

fn toml_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
