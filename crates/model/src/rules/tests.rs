use super::*;
use crate::time::Timestamp;
use proptest::prelude::*;

/// Holds one message against `when` and says whether it holds: through the public way, which tells unknown
/// from false by a second rule that negates the first.
fn holds(when: &str, facts: &Facts<'_>, state: &DeviceRules) -> Result<Option<bool>, String> {
    let mut rules = RuleSet::default();
    for (id, when) in [("yes", when.to_owned()), ("no", format!("!({when})"))] {
        rules.put("t", &rule_text(id, &when), 1).map_err(|e| e.to_string())?;
    }
    rules.index();
    let mut evaluator = Evaluator::default();
    let steps = evaluator.evaluate(&rules, facts, state);
    let began = |id: &str| steps.iter().any(|s| &*rules.at(s.rule).id == id && s.kind == StepKind::Begin);
    assert!(!(began("yes") && began("no")), "{when} both holds and does not");
    Ok(if began("yes") {
        Some(true)
    } else if began("no") {
        Some(false)
    } else {
        None
    })
}

fn rule_text(id: &str, when: &str) -> String {
    format!("id = '{id}'\nsummary = 'S.'\nseverity = 'info'\nwhen = '''{when}'''\n")
}

fn facts<'a>(measurements: &'a [MeasurementRef<'a>]) -> Facts<'a> {
    Facts {
        site: "site-1",
        device: "pump-7",
        agent_version: Some("2.1"),
        config_version: None,
        stream: "telemetry",
        measurements,
        age: 0,
    }
}

fn number(name: &str, number: f64) -> MeasurementRef<'_> {
    MeasurementRef { name, number: Some(number), ..MeasurementRef::default() }
}

fn text<'a>(name: &'a str, text: &'a str) -> MeasurementRef<'a> {
    MeasurementRef { name, text: Some(text), ..MeasurementRef::default() }
}

fn flag(name: &str, flag: bool) -> MeasurementRef<'_> {
    MeasurementRef { name, flag: Some(flag), ..MeasurementRef::default() }
}

#[test]
fn conditions_mean_what_the_documentation_says() {
    let measurements = [
        number("temperature", 91.0),
        number("ENERGY.Power", 40.0),
        number("counter", 30.0),
        text("mode", "auto"),
        flag("running", true),
        number("weird name", 1.0),
        MeasurementRef { name: "nothing", ..MeasurementRef::default() },
        number("device", 3.0),
        text("umlaut", "äöü"),
    ];
    let state = DeviceRules {
        previous: vec![
            Past { name: "mode".into(), value: PastValue::Text("eco".into()), at: Timestamp(1) },
            Past { name: "temperature".into(), value: PastValue::Number(80.0), at: Timestamp(1) },
        ],
        ..DeviceRules::default()
    };
    for (when, expected) in [
        ("temperature > 90", Some(true)),
        ("90 < temperature && running", Some(true)),
        ("temperature > 90.5 ? mode == 'auto' : false", Some(true)),
        ("temperature - previous.temperature > 10", Some(true)),
        ("mode != previous.mode", Some(true)),
        ("mode == previous[\"mode\"]", Some(false)),
        ("mode < previous.mode", Some(true)),
        ("running < running", None),
        ("ENERGY.Power >= 40 && m[\"ENERGY.Power\"] <= 40", Some(true)),
        ("m['weird name'] == 1", Some(true)),
        ("m.temperature > 90 && m[\"device\"] == 3", Some(true)),
        ("mode in ['auto', 'eco'] && temperature in [1, 91]", Some(true)),
        ("mode.startsWith('au') && mode.endsWith('o') && mode.contains('ut')", Some(true)),
        ("size(mode) == 4 && mode.size() == 4 && size(umlaut) == 3", Some(true)),
        ("counter % 7 == 2", Some(true)),
        ("abs(-temperature) == max(temperature, 1, 2.5) && min(3, 2) == 2", Some(true)),
        ("has(temperature) && has(m.mode) && !has(m['absent']) && !has(nothing)", Some(true)),
        ("has(previous.mode) && !has(previous.counter)", Some(true)),
        ("has(device.agent_version) && !has(device.config_version)", Some(true)),
        ("device.site == 'site-1' && device.id == 'pump-7' && stream == 'telemetry'", Some(true)),
        ("device.agent_version < '3'", Some(true)),
        // Unknown neither holds nor does not, and is absorbed by what decides.
        ("absent > 1", None),
        ("absent > 1 || temperature > 90", Some(true)),
        ("absent > 1 && temperature > 99", Some(false)),
        ("absent > 1 && temperature > 90", None),
        ("absent > 1 ? true : true", None),
        ("temperature > 90 ? true : absent > 1", Some(true)),
        ("mode > 90", None),
        ("nothing == 1", None),
        ("device.config_version == '1'", None),
        ("previous.counter > 1", None),
        ("temperature in [91, absent]", None),
        ("1 / 0 == 1 || temperature < 90", None),
        ("9223372036854775807 + 1 > 0", None),
        ("temperature / 0 > 1", Some(true)),
        ("7 / 2 == 3 && temperature / 2 == 45.5", Some(true)),
    ] {
        let got = holds(when, &facts(&measurements), &state);
        assert_eq!(got, Ok(expected), "{when}");
    }
}

#[test]
fn what_is_outside_the_subset_is_refused_with_its_place() {
    for (when, column, what) in [
        ("temperature > 90 && temperature == \"x\"", 36, "does not fit: a number is compared with text"),
        (
            "temperature > 90 && temperature.startsWith(\"x\")",
            21,
            "does not fit: `temperature` stands where text is needed, but is used as a number at 1:1",
        ),
        ("temperature", 0, ""),
        ("temperature + 1", 13, "does not fit: a number stands where a truth value is needed"),
        ("'a' > 1", 7, "does not fit: text is compared with a number"),
        ("running < true", 9, "does not fit: truth values have no order"),
        ("mode + 'x' == 'y'", 1, "joining texts is outside the subset"),
        (
            "device.foo == 'x'",
            1,
            "unknown name `device.foo` (known: device.site, device.id, device.agent_version, device.config_version)",
        ),
        ("device.sit == 'x'", 1, "unknown name `device.sit`; did you mean `site`?"),
        ("device > 1", 1, "`device` is not a value"),
        ("previous > 1", 1, "`previous` is not a value: write `previous.name`"),
        (
            "temperature > 1 && foo(temperature)",
            23,
            "unknown function `foo` (known: abs, contains, endsWith, has, max, min, size, startsWith)",
        ),
        ("mode.startWith('a')", 15, "unknown function `startWith`; did you mean `startsWith`?"),
        ("mode.matches('a.*')", 13, "unknown function `matches`"),
        ("[1, 2].exists(x, x > 1)", 14, "unknown function `exists`"),
        ("size(a, b) > 1", 5, "`size` is called as `size(x)`"),
        ("temperature > null", 15, "null is outside the subset"),
        ("temperature > 1u", 15, "unsigned literals"),
        ("a['x'] > 1", 1, "only `m[\"name\"]` and `previous[\"name\"]` take an index"),
        ("m[x] > 1", 3, "the name of a measurement is a text literal"),
        ("mode in other", 9, "the right side of `in` is a list"),
        ("{'a': 1} == {'a': 1}", 1, "outside the subset"),
        ("temperature > ", 15, "not CEL: mismatched input '<EOF>'"),
        ("temperature >> 3", 14, "not CEL: "),
        ("", 1, "the expression is empty"),
        (
            "mode == 'äöü' && temperature == 'x' && temperature > 1",
            54,
            "does not fit: text is compared with a number",
        ),
        ("mode == 'äöü' && temperature >> 1", 31, "not CEL"),
        ("a in [b, c]", 1, "nothing tells which type this has: put a literal in the list"),
        ("(a ? b : c) == d", 6, "nothing tells which type the branches have"),
    ] {
        match Expression::compile(when, &mut Names::default()) {
            Ok(_) => assert_eq!(column, 0, "{when} was accepted"),
            Err(e) => {
                assert!(e.what.contains(what), "{when}: {e}");
                assert_eq!((e.line, e.column), (1, column), "{when}: {e}");
            }
        }
    }
}

#[test]
fn an_error_shows_the_line_and_points_at_the_place() {
    let error = Expression::compile("temperature > 90 &&\n  temperature == \"x\"", &mut Names::default());
    assert_eq!(
        error.expect_err("types conflict").to_string(),
        "does not fit: a number is compared with text (at 2:18)\n  |   temperature == \"x\"\n  |                  ^"
    );
}

#[test]
fn faults_of_a_file_name_line_column_and_remedy() {
    let head = "id = 'hot'\nsummary = 'Hot.'\nseverity = 'critical'\n";
    for (rest, expected) in [
        ("wen = 'a > 1'\n", "r.toml:4:1: unknown key `wen`; did you mean `when`?"),
        ("", "r.toml:1:1: the key `when` is missing"),
        ("when = 'a > 1 && device.foo == \"x\"'\n", "r.toml:4:18: `when`: unknown name `device.foo`"),
        (
            "when = 'a > 1'\nclear_when = 'a == \"x\"'\n",
            "r.toml:5:20: `clear_when`: does not fit: a number is compared with text (at 1:6)",
        ),
        ("when = 'a > 1'\nfor = '30'\n", "r.toml:5:7: a duration is a number with"),
        ("when = 'a > 1'\nsites = []\n", "r.toml:5:9: `sites` is empty"),
        ("when = 'a > 1'\nsites = ['a/b']\n", "r.toml:5:10: a site has no `/`"),
        (
            "when = 'a > 1'\nforward = 'data_core.reading.v1'\n",
            "r.toml:5:11: rules cannot forward to `data_core.reading.v1`",
        ),
        ("when = 'a > 1'\nalert = false\n", "r.toml:5:9: the rule does nothing"),
        (
            "when = 'a > 1'\n[[command]]\nname = 'stop'\n[[command]]\nname = 'stop'\n",
            "r.toml:8:8: the command `stop` is there twice",
        ),
        (
            "when = 'a > 1'\n[[command]]\nname = 'stop'\nexpire_in = 3\n",
            "r.toml:7:1: unknown key `expire_in`; did you mean `expires_in`?",
        ),
    ] {
        let text = format!("{head}{rest}");
        let error = RuleSet::default().put("r.toml", &text, 1).expect_err(rest).to_string();
        assert!(error.starts_with(expected), "{rest}: {error}");
    }
    let text = head.replace("critical", "fatal") + "when = 'a > 1'\n";
    let error = RuleSet::default().put("r.toml", &text, 1).expect_err("fatal").to_string();
    assert!(error.contains("unknown value `fatal`"), "{error}");
    let error = RuleSet::default().put("r.toml", &rule_text("Hot!", "a > 1"), 1).expect_err("id").to_string();
    assert!(error.contains("cannot name a rule"), "{error}");
}

#[test]
fn a_definition_gives_what_it_says() {
    let text = "id = 'hot'\nsummary = 'Hot.'\nseverity = 'critical'\nwhen = 'a > 1'\nfor = '1.5m'\nlateness = 20\n\
                forward = 'data_core.forwarded.v1'\n\
                [[command]]\nname = 'stop'\nexpires_in = '250ms'\narguments = { speed = 3, mode = 'off', force = true }\n";
    let definition = RuleDefinition::parse("r", text).expect("valid");
    let rule = definition.compile("r", text, 7, &mut Names::default()).expect("valid");
    assert_eq!((rule.hold.as_millis(), rule.lateness_us), (90_000, 20_000_000));
    assert_eq!((rule.severity, rule.output_key().as_str()), ("critical", "hot@7"));
    assert_eq!(rule.forward, Some(crate::topics::DATA_CORE_FORWARDED_V1));
    let command = &rule.commands[0];
    assert_eq!((command.expires_in.as_millis(), command.request_code.as_str()), (250, "stop"));
    let names: Vec<_> =
        command.arguments.iter().map(|a| (a.name.as_str(), a.number, a.text.as_deref(), a.flag)).collect();
    let expected = [
        ("force", None, None, Some(true)),
        ("mode", None, Some("off"), None),
        ("speed", Some(3.0), None, None),
    ];
    assert_eq!(names, expected);
    assert!(rule.reads("a") && !rule.reads("b"));
}

#[test]
fn a_scope_covers_what_its_patterns_match() {
    for (scope, site, device, covered) in [
        ("", "s", "d", true),
        ("sites = ['s-*']", "s-1", "d", true),
        ("sites = ['s-*']", "t-1", "d", false),
        ("sites = ['x', 's']", "s", "d", true),
        ("devices = ['pump-*']", "s", "pump-7", true),
        ("devices = ['pump-*']", "s", "valve-7", false),
        ("devices = ['s/*-7']", "s", "pump-7", true),
        ("devices = ['s/*-7']", "t", "pump-7", false),
        ("devices = ['p*m*7']", "s", "pump-77", true),
        ("sites = ['s']\ndevices = ['d']", "s", "e", false),
    ] {
        let text = format!("{}{scope}\n", rule_text("r", "a > 1"));
        let mut rules = RuleSet::default();
        rules.put("r", &text, 1).expect("valid");
        rules.index();
        assert_eq!(rules.at(0).scope.covers(site, device), covered, "{scope} {site}/{device}");
    }
}

#[test]
fn a_message_touches_only_rules_that_it_could_decide() {
    let mut rules = RuleSet::default();
    for (id, when) in [
        ("a", "x > 1"),
        ("b", "x > 1 && y > 1"),
        ("c", "!has(m.x)"),
        ("d", "z > 1 || device.site == 'site-1'"),
        ("e", "z > 1"),
        ("f", "previous.z > 1"),
        ("g", "mode == 'auto' && (x > 1 || y > 5)"),
        ("h", "has(x) && x > 5"),
        ("i", "2 > y || z > 1"),
    ] {
        rules.put("t", &rule_text(id, when), 1).expect(when);
    }
    rules.index();
    let always: Vec<_> = rules.always().iter().map(|i| &*rules.at(*i).id).collect();
    assert_eq!(always, ["c", "d", "f"]);
    let mut evaluator = Evaluator::default();
    let measurements = [number("x", 2.0), number("y", 2.0)];
    let steps = evaluator.evaluate(&rules, &facts(&measurements), &DeviceRules::default()).to_vec();
    let began: Vec<_> = steps.iter().map(|s| &*rules.at(s.rule).id).collect();
    assert_eq!(began, ["d", "a", "b"]);
    let steps = evaluator.evaluate(&rules, &facts(&[]), &DeviceRules::default()).to_vec();
    let began: Vec<_> = steps.iter().map(|s| &*rules.at(s.rule).id).collect();
    assert_eq!(began, ["c", "d"], "nothing of the message before is left");
}

// ---- The interpreter of the `cel` crate as oracle ----

#[derive(Clone, Debug)]
struct World {
    numbers: [Option<f64>; 2],
    texts: [Option<String>; 2],
    flags: [Option<bool>; 2],
    previous_number: Option<f64>,
}

fn world() -> impl Strategy<Value = World> {
    let number = || prop::option::weighted(0.8, prop_oneof![(-4i32..5).prop_map(f64::from), -1e3..1e3f64]);
    let text = || prop::option::weighted(0.8, "[ab]{0,3}");
    let flag = || prop::option::weighted(0.8, any::<bool>());
    (number(), number(), text(), text(), flag(), flag(), number()).prop_map(|(a, b, s, t, f, g, p)| World {
        numbers: [a, b],
        texts: [s, t],
        flags: [f, g],
        previous_number: p,
    })
}

fn number_expr() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        (-40i32..40).prop_map(|i| format!("{:?}", f64::from(i) / 8.0)),
        prop_oneof![Just("a"), Just("b"), Just("m.a"), Just("previous.a")].prop_map(str::to_owned),
    ];
    leaf.prop_recursive(3, 8, 2, |inner| {
        prop_oneof![
            (inner.clone(), prop_oneof![Just("+"), Just("-"), Just("*"), Just("/")], inner.clone())
                .prop_map(|(l, op, r)| format!("({l} {op} {r})")),
            inner.clone().prop_map(|n| format!("(-{n})")),
            (inner.clone(), inner).prop_map(|(l, r)| format!("(f ? {l} : {r})")),
        ]
    })
}

fn integer_expr() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        (-9i64..9).prop_map(|i| i.to_string()),
        Just("9223372036854775807".to_owned()),
        Just("size(s)".to_owned()),
    ];
    leaf.prop_recursive(3, 8, 2, |inner| {
        (inner.clone(), prop_oneof![Just("+"), Just("-"), Just("*"), Just("/"), Just("%")], inner)
            .prop_map(|(l, op, r)| format!("({l} {op} {r})"))
    })
}

fn text_expr() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ab]{0,2}".prop_map(|t| format!("'{t}'")),
        prop_oneof![Just("s"), Just("t"), Just("device.site"), Just("stream"), Just("m.s")]
            .prop_map(str::to_owned),
        Just("(g ? s : 'a')".to_owned()),
    ]
}

fn flag_expr() -> impl Strategy<Value = String> {
    let op = || prop_oneof![Just("=="), Just("!="), Just("<"), Just("<="), Just(">"), Just(">=")];
    let leaf = prop_oneof![
        4 => (number_expr(), op(), number_expr()).prop_map(|(l, o, r)| format!("{l} {o} {r}")),
        2 => (integer_expr(), op(), integer_expr()).prop_map(|(l, o, r)| format!("{l} {o} {r}")),
        1 => (number_expr(), op(), integer_expr()).prop_map(|(l, o, r)| format!("{l} {o} {r}")),
        2 => (text_expr(), op(), text_expr()).prop_map(|(l, o, r)| format!("{l} {o} {r}")),
        1 => prop_oneof![Just("f"), Just("g"), Just("true"), Just("false")].prop_map(str::to_owned),
        1 => (number_expr(), number_expr(), number_expr()).prop_map(|(x, a, b)| format!("{x} in [{a}, {b}]")),
        1 => (text_expr(), text_expr(), text_expr()).prop_map(|(x, a, b)| format!("{x} in [{a}, {b}]")),
        1 => (text_expr(), prop_oneof![Just("startsWith"), Just("endsWith"), Just("contains")], text_expr())
            .prop_map(|(t, f, p)| format!("{t}.{f}({p})")),
        1 => prop_oneof![Just("has(m.a)"), Just("has(m.s)"), Just("has(previous.a)")].prop_map(str::to_owned),
    ];
    leaf.prop_map(|f| format!("({f})")).prop_recursive(4, 16, 3, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(l, r)| format!("({l} && {r})")),
            (inner.clone(), inner.clone()).prop_map(|(l, r)| format!("({l} || {r})")),
            inner.clone().prop_map(|f| format!("(!{f})")),
            (inner.clone(), inner.clone(), inner.clone()).prop_map(|(c, l, r)| format!("({c} ? {l} : {r})")),
            (inner.clone(), inner).prop_map(|(l, r)| format!("({l} == {r})")),
        ]
    })
}

fn interpret(when: &str, world: &World) -> Option<bool> {
    let mut m = std::collections::HashMap::<String, cel::Value>::new();
    let [a, b] = world.numbers;
    let [s, t] = world.texts.clone();
    let [f, g] = world.flags;
    m.extend(a.map(|a| ("a".to_owned(), a.into())));
    m.extend(b.map(|b| ("b".to_owned(), b.into())));
    m.extend(s.map(|s| ("s".to_owned(), s.into())));
    m.extend(t.map(|t| ("t".to_owned(), t.into())));
    m.extend(f.map(|f| ("f".to_owned(), f.into())));
    m.extend(g.map(|g| ("g".to_owned(), g.into())));
    let previous: std::collections::HashMap<String, cel::Value> =
        world.previous_number.map(|p| ("a".to_owned(), p.into())).into_iter().collect();
    let device = std::collections::HashMap::from([("site".to_owned(), cel::Value::from("site-1"))]);
    let mut context = cel::Context::default();
    for (name, value) in &m {
        context.add_variable_from_value(name.clone(), value.clone());
    }
    context.add_variable_from_value("m", m.clone());
    context.add_variable_from_value("previous", previous);
    context.add_variable_from_value("device", device);
    context.add_variable_from_value("stream", "telemetry");
    match cel::Program::compile(when).expect("generated").execute(&context) {
        Ok(cel::Value::Bool(b)) => Some(b),
        Ok(other) => panic!("{when} gave {other:?}"),
        Err(_) => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, max_global_rejects: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn a_compiled_condition_agrees_with_the_interpreter(when in flag_expr(), world in world()) {
        prop_assume!(when.len() < 900);
        let mut measurements = Vec::new();
        for (name, n) in ["a", "b"].into_iter().zip(world.numbers) {
            measurements.extend(n.map(|n| number(name, n)));
        }
        for (name, t) in ["s", "t"].into_iter().zip(&world.texts) {
            measurements.extend(t.as_deref().map(|t| text(name, t)));
        }
        for (name, f) in ["f", "g"].into_iter().zip(world.flags) {
            measurements.extend(f.map(|f| flag(name, f)));
        }
        let past = |n| Past { name: "a".into(), value: PastValue::Number(n), at: Timestamp(1) };
        let previous = world.previous_number.map(past);
        let state = DeviceRules { previous: previous.into_iter().collect(), ..DeviceRules::default() };
        let got = match holds(&when, &facts(&measurements), &state) {
            Err(e) if e.contains("nothing tells which type") => return Err(TestCaseError::reject("no type")),
            got => got.map_err(TestCaseError::fail)?,
        };
        prop_assert_eq!(got, interpret(&when, &world), "{} in {:?}", when, world);
    }

    #[test]
    fn arbitrary_text_is_refused_or_compiled_but_never_a_panic(text in ".{0,200}") {
        let _ = Expression::compile(&text, &mut Names::default());
    }

    #[test]
    fn a_soup_of_tokens_is_refused_or_compiled_but_never_a_panic(
        tokens in prop::collection::vec(prop::sample::select(vec![
            "a", "m", "previous", "device", "has", "size", "(", ")", "[", "]", "{", "}", ".", ",", "?", ":", "&&",
            "||", "!", "-", "+", "*", "/", "%", "<", ">=", "==", "in", "1", "2.5", "1e400", "'x'", "\"y", "b'z'",
            "r'\\", "'''", "null", "true", "1u", "0x", "9223372036854775808", "ä", "`", "//", "\n", " ", "@", "\\u{110000}",
        ]), 0..40),
        glue in prop::sample::select(vec!["", " "]),
    ) {
        let _ = Expression::compile(&tokens.join(glue), &mut Names::default());
    }
}

#[test]
fn text_that_nests_or_chains_to_the_bound_is_refused_or_compiled() {
    let bound = EXPRESSION_BYTES_MAX;
    for unit in
        ["1+", "(", "!", "-", "a.", "m[", "a?a:", "a&&", "a||", "[", "{", "a<", "f(", "- -", "!-", "a in "]
    {
        let text = unit.repeat(bound / unit.len());
        let _ = Expression::compile(&text, &mut Names::default());
        let closed = format!("{}a", &text[..text.len() - unit.len()]);
        let _ = Expression::compile(&closed, &mut Names::default());
    }
    let long = "a".repeat(bound + 1);
    let error = Expression::compile(&long, &mut Names::default()).expect_err("too long");
    assert!(error.what.contains("more than 2048"), "{error}");
}

#[test]
fn a_pending_rule_is_due_when_it_has_held_and_a_changed_rule_is_stale() {
    let mut rules = RuleSet::default();
    rules.put("t", &format!("{}for = '30s'\n", rule_text("r", "a > 1")), 3).expect("valid");
    rules.index();
    let mut state = DeviceRules::default();
    state.activate(Active::pending(rules.at(0), Timestamp(1_000), Cause::default()));
    assert_eq!(state.due_at(), Some(Timestamp(30_001_000)));
    let text = serde_json::to_string(&state).expect("serializes");
    assert_eq!(serde_json::from_str::<DeviceRules>(&text).expect("ours"), state);
    assert!(state.clone().take_due(Timestamp(30_000_999)).is_empty());
    assert_eq!(state.clone().take_due(Timestamp(30_001_000)).len(), 1);
    assert!(state.take_stale(&rules).is_empty());
    rules.put("t", &rule_text("r", "a > 2"), 4).expect("valid");
    rules.index();
    assert_eq!(state.clone().take_stale(&rules)[0].1, "rule_changed");
    rules.remove("r");
    rules.index();
    assert_eq!(state.take_stale(&rules)[0].1, "rule_disabled");
}

#[test]
fn the_rules_of_the_demo_and_of_the_documentation_are_valid() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut texts = Vec::new();
    for entry in std::fs::read_dir(root.join("demo/rules")).expect("the demo has rules") {
        let path = entry.expect("readable").path();
        let text = std::fs::read_to_string(&path).expect("readable");
        let stem = path.file_stem().and_then(|s| s.to_str()).expect("UTF-8").to_owned();
        assert!(text.contains(&format!("id = \"{stem}\"")), "{stem} is named after its file");
        texts.push((stem, text));
    }
    let page = std::fs::read_to_string(root.join("docs/rules.md")).expect("readable");
    let blocks: Vec<_> =
        page.split("```toml\n").skip(1).map(|b| b.split("```").next().unwrap_or_default()).collect();
    texts.push(("docs/rules.md".to_owned(), blocks.concat()));
    assert!(texts.len() >= 3, "{texts:?}");
    for (name, text) in texts {
        let mut rules = RuleSet::default();
        assert_eq!(rules.put(&name, &text, 1), Ok(()));
        rules.index();
        assert_eq!(rules.len(), 1, "{name}");
    }
}
