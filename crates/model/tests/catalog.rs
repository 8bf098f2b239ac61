//! The catalog as its users see it: the embedded files, an operator's mistakes, derived topics, plans.

use std::collections::BTreeMap;
use std::time::Duration;
use throughline_model::catalog::{
    Catalog, Environment, Observed, ObservedSchema, ObservedTopic, Plan, RECORD_BYTES_MAX, changelog_topic,
    plan, strimzi,
};
use throughline_model::stage::{Kind, StageSpec};
use throughline_model::topics::{
    DEVICE_TELEMETRY_V1, SCHEMA_FILES, SERVICE_PLATFORM_ALERT_V1, SERVICE_PLATFORM_RULE_V1,
    SERVICE_PLATFORM_TWIN_V1, TOPIC_FILES,
};

fn stage(group: &'static str, inputs: &[&'static str], changelog: Option<String>) -> StageSpec {
    StageSpec {
        group,
        kind: Kind::Decide,
        inputs: inputs.to_vec(),
        tables: Vec::new(),
        changelog,
        commit_interval: Duration::from_millis(50),
    }
}

fn stages() -> Vec<StageSpec> {
    let mut rules = stage(
        "evaluate_rules",
        &[DEVICE_TELEMETRY_V1],
        Some(changelog_topic(DEVICE_TELEMETRY_V1, "evaluate_rules")),
    );
    rules.tables.push(SERVICE_PLATFORM_RULE_V1);
    let twins = stage("update_twin", &[DEVICE_TELEMETRY_V1], Some(SERVICE_PLATFORM_TWIN_V1.to_owned()));
    vec![rules, twins]
}

#[test]
fn the_embedded_catalog_reads() {
    let catalog = match Catalog::parse(TOPIC_FILES, SCHEMA_FILES) {
        Ok(catalog) => catalog,
        Err(faults) => panic!("{}", faults.iter().map(|f| format!("{f}\n")).collect::<String>()),
    };
    assert_eq!(catalog, Catalog::embedded());
    assert_eq!(catalog.topics().count(), TOPIC_FILES.len());
    let listed: String = catalog
        .feeds()
        .iter()
        .map(|(topic, feed)| format!("{} {} -> {}\n", feed.filter, feed.name, topic.spec.name))
        .collect();
    insta::assert_snapshot!("feeds", listed);
}

#[test]
fn only_an_act_stage_has_a_retry_topic_and_it_is_co_partitioned() {
    let catalog = Catalog::embedded();
    let mut notify = stage("notify", &[SERVICE_PLATFORM_ALERT_V1], None);
    for (kind, expected) in [
        (Kind::Load, ["dlt 1", "parking 1", "replay 6"].as_slice()),
        (Kind::Act, &["dlt 1", "parking 1", "replay 6", "retry 6"]),
    ] {
        notify.kind = kind;
        let desired = catalog.desired(&[notify.clone()], Environment::SINGLE).expect("sound");
        let derived = desired.topics.iter().filter_map(|topic| {
            let suffix = topic.name.strip_prefix("service_platform.alert.v1.notify-")?;
            Some(format!("{suffix} {}", topic.partitions))
        });
        assert_eq!(derived.collect::<Vec<_>>(), expected, "{kind:?}");
        let exported = strimzi::export(&desired, "main").expect("no collision");
        let is_exported = exported.contains("service_platform.alert.v1.notify-retry");
        assert_eq!(is_exported, kind == Kind::Act, "{kind:?}");
    }
}

const TOPIC: &str = r#"name = "device.sample.v1"
summary = "Samples."
owner = "lab"
key = "site/device"
schema = "device.telemetry.v1.avsc"
partitions = 6
cleanup = "delete"
retention = "7d"
"#;

/// Replaces `find` in the sample file and returns the faults as text.
fn faults_of(find: &str, replace: &str) -> String {
    assert!(TOPIC.contains(find), "{find}");
    faults_of_file("device.sample.v1.toml", &TOPIC.replace(find, replace))
}

fn faults_of_file(name: &str, text: &str) -> String {
    match Catalog::with_extra(&[(name, text)], &[]) {
        Ok(_) => String::new(),
        Err(faults) => faults.iter().map(|f| format!("{f}\n")).collect(),
    }
}

#[test]
fn a_sound_extra_file_joins_the_catalog_and_one_of_the_same_name_replaces() {
    let added = Catalog::with_extra(&[("device.sample.v1.toml", TOPIC)], &[]).expect("sound");
    assert_eq!(added.topics().count(), TOPIC_FILES.len() + 1);
    let (file, text) = TOPIC_FILES.iter().find(|(f, _)| f.starts_with("device.session")).expect("embedded");
    let changed = text.replace("30d", "1d");
    let replaced = Catalog::with_extra(&[(*file, changed.as_str())], &[]).expect("sound");
    assert_eq!(replaced.topics().count(), TOPIC_FILES.len());
    assert_ne!(replaced, Catalog::embedded());
}

#[test]
fn a_mistake_in_a_topic_file_names_place_and_remedy() {
    for (find, replace, expected) in [
        (
            "partitions = 6",
            "partitons = 6",
            "device.sample.v1.toml:6:1: unknown key `partitons`; did you mean `partitions`?",
        ),
        (
            "device.sample.v1\"\ns",
            "Device.Sample.v1\"\ns",
            "device.sample.v1.toml:1:8: `Device.Sample.v1` is not a topic name",
        ),
        (
            "device.sample.v1\"\ns",
            "device.samples.v1\"\ns",
            "1:8: the file of topic `device.samples.v1` is called `device.samples.v1.toml`",
        ),
        ("partitions = 6", "partitions = 0", "6:14: `partitions` is 0"),
        ("retention = \"7d\"", "retention = \"7w\"", "8:13: `7w` is not a retention"),
        ("retention = \"7d\"\n", "", "7:11: `cleanup = \"delete\"` needs `retention`"),
        ("\"delete\"", "\"compact\"", "8:13: a compacted topic keeps"),
        ("\"site/device\"", "\"device\"", "4:7: unknown value `device`; did you mean `site/device`?"),
        (
            "device.telemetry.v1.avsc",
            "device.telemetri.v1.avsc",
            "5:10: the schema file `device.telemetri.v1.avsc` does not exist beside it; did you mean `device.telemetry.v1.avsc`?",
        ),
        (
            "device.telemetry.v1.avsc",
            "data_core.reading.v1.avsc",
            "data_core.reading.v1.avsc:4:3: the record `throughline.data_core.Reading` is not in the namespace `throughline.device`",
        ),
        ("Samples.", "Samples. Of things.", "2:11: `summary` is one sentence"),
        (
            "retention = \"7d\"",
            "retention = \"7d\"\n[config]\n\"segmnt.ms\" = \"5\"",
            "10:15: `segmnt.ms` is not a topic setting of Kafka; did you mean `segment.ms`?",
        ),
        (
            "retention = \"7d\"",
            "retention = \"7d\"\n[[replay]]\ncode = \"unknown_shema\"\nafter = \"10m\"",
            "10:8: no dead letter has the code `unknown_shema`; did you mean `unknown_schema`?",
        ),
        (
            "retention = \"7d\"",
            "retention = \"7d\"\n[[replay]]\ncode = \"unknown_schema\"\nafter = \"1s\"\ntimes = 10",
            "11:9: `after` is 15 seconds to 30 days",
        ),
        (
            "retention = \"7d\"",
            "retention = \"7d\"\n[[replay]]\ncode = \"unknown_schema\"\naftr = \"10m\"",
            "11:1: unknown key `aftr`; did you mean `after`?",
        ),
        (
            "retention = \"7d\"",
            "retention = \"7d\"\nconfig = { \"retention.ms\" = \"5\" }",
            "write `retention`",
        ),
    ] {
        let found = faults_of(find, replace);
        assert!(found.contains(expected), "{replace}: {found}");
    }
}

#[test]
fn a_policy_of_replays_is_about_the_stages_that_read_its_topic() {
    let policies = |replay: &str| {
        let text = TOPIC.replace("device.sample.v1", "device.telemetry.v1") + replay;
        Catalog::with_extra(&[("device.telemetry.v1.toml", text.as_str())], &[])
            .expect("sound")
            .replay_policies(&stages())
    };
    assert_eq!(Catalog::embedded().replay_policies(&stages()), Ok(Vec::new()), "none comes with the build");
    let found = policies("[[replay]]\ncode = \"unknown_schema\"\nafter = \"10m\"\n").expect("sound");
    let letters: Vec<&str> = found.iter().map(|policy| policy.letters.as_str()).collect();
    assert_eq!(letters, ["device.telemetry.v1.evaluate_rules-dlt", "device.telemetry.v1.update_twin-dlt"]);
    assert_eq!((found[0].after, found[0].times, found[0].rate), (Duration::from_secs(600), 1, 1_000));
    let slip = "[[replay]]\nstage = \"update_twn\"\ncode = \"unknown_schema\"\nafter = \"10m\"\n";
    let faults = policies(slip).expect_err("no such stage");
    let expected = "device.telemetry.v1.toml:10:9: `update_twn` does not read `device.telemetry.v1`; did you mean `update_twin`?";
    assert!(faults[0].to_string().starts_with(expected), "{}", faults[0]);
}

#[test]
fn names_that_metrics_would_confuse_are_refused() {
    let text = TOPIC.replace("device.sample.v1", "device.telemetry_v1.v1");
    assert_eq!(faults_of_file("device.telemetry_v1.v1.toml", &text), "");
    let (a, b) = ("device.pump_state.v1", "device.pump.state.v1");
    let files = [a, b].map(|name| (format!("{name}.toml"), TOPIC.replace("device.sample.v1", name)));
    let faults = Catalog::with_extra(&files, &[]).expect_err("they collide");
    assert!(faults[0].to_string().contains("cannot tell them apart"), "{faults:?}");
}

#[test]
fn a_mistake_in_a_feed_names_place_and_remedy() {
    let feed = |options: &str| {
        faults_of_file("device.sample.v1.toml", &format!("{TOPIC}[[feed]]\nname = \"f\"\n{options}"))
    };
    let base = "filter = \"x/{device}\"\ndecoder = \"json\"\n";
    for (options, expected) in [
        (format!("{base}site = \"'a'\""), ""),
        (base.to_owned(), "11:10: feed `f`: `site` is missing: say where the site comes from"),
        (format!("{base}site = \"'a'\"\ntime = \"payload.t\""), "14:8: feed `f`: `time_zone` is missing"),
        (
            format!("{base}site = \"'a'\"\ntime = \"payload.t\"\ntime_zone = \"Berlin\""),
            "15:13: feed `f`: `Berlin` is not a time zone",
        ),
        (
            format!("{base}site = \"capture.sit\""),
            "13:8: feed `f`: `capture.sit`: `capture.sit` does not exist",
        ),
        (format!("{base}site = \"payload.\""), "13:8: feed `f`: `payload.` is not an expression"),
        (
            "filter = \"x/y\"\ndecoder = \"json\"\nsite = \"'a'\"".to_owned(),
            "11:10: feed `f`: `device` is missing",
        ),
        (
            "filter = \"x/#/y\"\ndecoder = \"json\"\nsite = \"'a'\"".to_owned(),
            "11:10: `x/#/y` is not a filter",
        ),
        (
            "filter = \"x/{device}\"\ndecoder = \"jsn\"\nsite = \"'a'\"".to_owned(),
            "12:11: unknown value `jsn`; did you mean `json`?",
        ),
        (
            "filter = \"x/{device}/{site}\"\ndecoder = \"native\"".to_owned(),
            "a native feed's filter captures",
        ),
        (
            "filter = \"x/{site}/{device}/up\"\ndecoder = \"native\"\nsite = \"'a'\"".to_owned(),
            "13:8: feed `f`: `site` does not belong to a native feed",
        ),
        (
            "filter = \"tele/{x}/SENSOR\"\ndecoder = \"json\"\nsite = \"'a'\"\ndevice = \"capture.x\""
                .to_owned(),
            "takes the same messages (`tele/+/SENSOR`); tell them apart with `when`",
        ),
        (
            format!(
                "{base}site = \"'a'\"\n[[feed]]\nname = \"f\"\nfilter = \"z/{{device}}\"\ndecoder = \"json\"\nsite = \"'a'\""
            ),
            "15:8: feed `f`: the name is taken",
        ),
        (format!("{base}sit = \"'a'\""), "13:1: unknown key `sit`; did you mean `site`?"),
    ] {
        let found = feed(&options);
        let right = if expected.is_empty() { found.is_empty() } else { found.contains(expected) };
        assert!(right, "{options}: {found}");
    }
    let not_fed = TOPIC.replace("device.sample.v1", "data_core.sample.v1");
    let text = format!("{not_fed}[[feed]]\nname = \"f\"\n{base}site = \"'a'\"");
    assert!(
        faults_of_file("data_core.sample.v1.toml", &text)
            .contains("only topics of `device` and `3rd_party` have feeds")
    );
}

#[test]
fn a_schema_without_the_envelope_is_refused_field_by_field() {
    let (_, sound) = SCHEMA_FILES.iter().find(|(f, _)| *f == "device.telemetry.v1.avsc").expect("embedded");
    let check = |find: &str, replace: &str| -> String {
        assert!(sound.contains(find), "{find}");
        let schema = sound.replacen(find, replace, 1);
        match Catalog::with_extra(&[] as &[(&str, &str)], &[("device.telemetry.v1.avsc", &schema)]) {
            Ok(_) => String::new(),
            Err(faults) => faults.iter().map(|f| format!("{f}\n")).collect(),
        }
    };
    for (find, replace, expected) in [
        ("\"trace_id\"", "\"traceid\"", "the envelope's field `trace_id` is missing: it is `string`"),
        (
            "\"logicalType\": \"uuid\"",
            "\"x\": \"y\"",
            "`message_id` must be `string` with logicalType `uuid`",
        ),
        (
            "\"logicalType\": \"timestamp-micros\"",
            "\"logicalType\": \"timestamp-millis\"",
            "`occurred_at` must be `long` with logicalType `timestamp-micros`",
        ),
        ("\"clock_offset\"", "\"clock_drift\"", ""),
        ("\"record\"", "\"recrd\"", "the schema is not Avro"),
        ("{", "", "the schema is not JSON"),
    ] {
        let found = check(find, replace);
        let right = if expected.is_empty() { found.is_empty() } else { found.contains(expected) };
        assert!(right, "{replace}: {found}");
    }
}

#[test]
fn stages_and_the_bridge_derive_their_topics() {
    let derived = Catalog::embedded().derived(&stages()).expect("they fit");
    let listed: String = derived
        .iter()
        .map(|t| {
            let retention = t.retention.map_or("-".to_owned(), |r| r.to_string());
            format!("{} {:?} {} {} {retention}\n", t.name, t.kind, t.partitions, t.cleanup.policy())
        })
        .collect();
    insta::assert_snapshot!("derived", listed);
}

#[test]
fn stages_whose_topics_do_not_fit_are_refused() {
    let rule_and_device = stage("s", &[DEVICE_TELEMETRY_V1, SERVICE_PLATFORM_RULE_V1], None);
    let unknown = stage("s", &["device.telemetri.v1"], None);
    let foreign_changelog =
        stage("s", &[DEVICE_TELEMETRY_V1], Some("device.telemetry.v1.other-changelog".into()));
    let published = stage("s", &[DEVICE_TELEMETRY_V1], Some(SERVICE_PLATFORM_RULE_V1.into()));
    let mut table = stage("s", &[DEVICE_TELEMETRY_V1], None);
    table.tables.push(DEVICE_TELEMETRY_V1);
    for (stage, expected) in [
        (rule_and_device, "its inputs are not co-partitioned"),
        (unknown, "unknown topic `device.telemetri.v1`; did you mean `device.telemetry.v1`?"),
        (foreign_changelog, "is neither a catalog topic nor `device.telemetry.v1.s-changelog`"),
        (published, "its state is not co-partitioned"),
        (table, "must be compacted"),
    ] {
        let faults = Catalog::embedded().derived(&[stage]).expect_err(expected);
        assert!(faults[0].to_string().contains(expected), "{faults:?}");
    }
}

/// A catalog of two topics keeps the snapshots readable.
fn small() -> Catalog {
    let file = |name: &str| {
        let schema = format!("{name}.avsc");
        let text = TOPIC.replace("device.sample.v1", name).replace("device.telemetry.v1.avsc", &schema);
        (format!("{name}.toml"), text)
    };
    let schema = |name: &str| {
        let (_, text) =
            SCHEMA_FILES.iter().find(|(f, _)| *f == "device.telemetry.v1.avsc").expect("embedded");
        (format!("{name}.avsc"), (*text).to_owned())
    };
    let names = ["device.alpha.v1", "device.beta.v1"];
    Catalog::parse(&names.map(file), &names.map(schema)).expect("sound")
}

fn planned(change: impl FnOnce(&mut Observed)) -> Plan {
    let desired = small().desired(&[], Environment::SINGLE).expect("no stages");
    let mut observed = Observed {
        topics: desired
            .topics
            .iter()
            .map(|t| ObservedTopic {
                name: t.name.clone(),
                partitions: t.partitions,
                replication: t.replication,
                configs: t.configs.clone(),
            })
            .collect(),
        schemas: desired
            .schemas
            .iter()
            .map(|s| ObservedSchema { subject: s.subject.clone(), latest: s.text.clone(), refused: None })
            .collect(),
    };
    change(&mut observed);
    plan(&desired, &observed)
}

#[test]
fn an_empty_cluster_is_filled_and_then_nothing_differs() {
    insta::assert_snapshot!("plan_empty_cluster", planned(|o| *o = Observed::default()));
    let nothing = planned(|_| {});
    assert!(nothing.is_empty());
    assert_eq!(nothing.to_string(), "Nothing differs.\n");
}

#[test]
fn drift_is_planned_and_what_would_break_is_refused() {
    let drifted = planned(|o| {
        o.topics[0].configs.insert("retention.ms".into(), "1".into());
        o.topics[0].configs.remove("min.insync.replicas");
        o.topics[0].configs.insert("segment.ms".into(), "5".into());
        o.topics[1].partitions = 12;
        o.topics[1].replication = 3;
        o.topics[2].partitions = 3;
        o.topics.push(ObservedTopic { name: "device.gone.v1".into(), ..o.topics[0].clone() });
        o.topics.push(ObservedTopic { name: "orders".into(), ..o.topics[0].clone() });
    });
    assert!(!drifted.is_empty());
    insta::assert_snapshot!("plan_drift", drifted);
}

#[test]
fn schemas_evolve_by_nullable_fields_only() {
    let clock_offset = |text: &str| {
        let at = text.find("\"clock_offset\"").expect("there");
        let start = text[..at].rfind('{').expect("there");
        let end = at + text[at..].find("},").expect("there") + 2;
        format!("{}{}", &text[..start], &text[end..])
    };
    let evolved = planned(|o| {
        o.schemas[0].latest = clock_offset(&o.schemas[0].latest);
        o.schemas[1].latest = o.schemas[1].latest.replace("\"name\": \"stream\"", "\"name\": \"channel\"");
    });
    insta::assert_snapshot!("plan_schemas", evolved);
    let refused = planned(|o| {
        o.schemas[0].latest = clock_offset(&o.schemas[0].latest);
        o.schemas[0].refused = Some("READER_FIELD_MISSING_DEFAULT_VALUE".into());
    });
    insta::assert_snapshot!("plan_registry_refuses", refused);
}

#[test]
fn the_plan_of_the_whole_catalog_settles_every_topic() {
    let desired = Catalog::embedded().desired(&stages(), Environment::PRODUCTION).expect("they fit");
    for topic in &desired.topics {
        let setting = |key: &str| topic.configs.get(key).map(String::as_str);
        assert_eq!(setting("message.timestamp.type"), Some("LogAppendTime"), "{}", topic.name);
        assert_eq!(setting("min.insync.replicas"), Some("2"), "{}", topic.name);
        let is_deleted = setting("cleanup.policy") == Some("delete");
        assert_eq!(setting("retention.ms").is_some(), is_deleted, "{}", topic.name);
    }
    let names: BTreeMap<&str, i32> = desired.topics.iter().map(|t| (t.name.as_str(), t.partitions)).collect();
    assert_eq!(names.len(), desired.topics.len(), "no topic twice");
}

#[test]
fn topics_export_as_strimzi_resources() {
    let desired = small().desired(&[], Environment::PRODUCTION).expect("no stages");
    insta::assert_snapshot!("strimzi", strimzi::export(&desired, "main").expect("no collision"));
    let whole = Catalog::embedded().desired(&stages(), Environment::PRODUCTION).expect("they fit");
    assert!(strimzi::export(&whole, "main").is_ok());
}

#[test]
fn no_topic_takes_a_larger_record_than_writers_may_send() {
    let desired = Catalog::embedded().desired(&stages(), Environment::SINGLE).expect("they fit");
    let bounds: Vec<u64> = desired
        .topics
        .iter()
        .filter_map(|topic| topic.configs.get("max.message.bytes"))
        .map(|bytes| bytes.parse().expect("a number"))
        .collect();
    assert_eq!(bounds.iter().max(), Some(&RECORD_BYTES_MAX), "the largest is exactly what writers may send");
}
