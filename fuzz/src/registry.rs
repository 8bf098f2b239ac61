//! What other registries write: answers, and records of `_schemas`.

use throughline_kafka::registry::answers::Answer;
use throughline_local::registry::state::{State, Written};
use throughline_model::topics::SCHEMA_FILES;

/// An answer: two bytes with its status, then its body. Whatever was asked, it is read or told in short, and
/// only a status of success answers with what was asked for.
pub fn registry_answers(data: &[u8]) {
    let [high, low, body @ ..] = data else { return };
    let Ok(body) = std::str::from_utf8(body) else { return };
    let status = u16::from_be_bytes([*high, *low]);
    let answer = Answer { url: "http://r", what: "schema 7", status, body };
    let is_success = (200..300).contains(&status);
    let errors = [
        answer.schema().map(|text| assert!(is_success || text.is_none())),
        answer.id().map(|_| assert!(is_success)),
        answer.id_if_any().map(|id| assert!(is_success || id.is_none())),
        answer.version().map(|version| assert!(is_success || version.is_none())),
        answer.subjects().map(|_| assert!(is_success)),
        answer.done().map(|()| assert!(is_success)),
        answer.compatible().map(|verdict| {
            let refused = verdict.and_then(Result::err);
            assert!(refused.is_none_or(|why| is_success && !why.is_empty()));
        }),
    ];
    let errors = errors.into_iter().filter_map(Result::err).map(|error| error.to_string());
    let for_a_stage = answer.schema_for_a_stage().map_err(|failure| failure.to_string());
    if for_a_stage == Ok(None) {
        assert!(body.contains("error_code"), "{status} {body:?} says that a schema is not there");
    }
    for error in errors.chain(for_a_stage.err()) {
        // A character is repeated as six, `\u{7f}`, where serde escapes it.
        assert!(
            error.len() <= 6 * body.len() + 256 && error.len() <= 5_000,
            "{} bytes: {error}",
            error.len()
        );
        assert!(!error.contains(char::is_control), "{error:?}");
    }
}

/// Records of `_schemas`: a line with a key and a line with its value, again and again; an empty value is a
/// tombstone.
pub fn registry_log(data: &[u8]) {
    let mut state = State::default();
    read(&mut state, data);
    let before = contents(&state);
    read(&mut state, data);
    assert_eq!(contents(&state), before, "what is read twice changes nothing");

    let known: Vec<String> = before.iter().map(|(_, _, _, text)| text.clone()).take(4).collect();
    let subjects: Vec<String> = before.iter().map(|(subject, ..)| subject.clone()).take(4).collect();
    let texts = known.iter().map(String::as_str).chain([SCHEMA_FILES[0].1, "\"long\""]);
    for text in texts {
        for subject in subjects.iter().map(String::as_str).chain(["new"]) {
            let all = state.check(subject, None, text).map(|complaints| complaints.is_empty());
            register(&mut state, subject, text, all.unwrap_or(false));
        }
    }
}

fn read(state: &mut State, data: &[u8]) {
    let mut lines = data.split(|byte| *byte == b'\n');
    while let Some(key) = lines.next() {
        state.apply(key, lines.next().filter(|value| !value.is_empty()));
    }
}

/// Returns every subject with its versions, their ids and texts; each is found under its id too.
fn contents(state: &State) -> Vec<(String, u32, u32, String)> {
    let mut contents = Vec::new();
    for subject in state.subjects() {
        let versions = state.versions(subject).expect("it is listed");
        let latest = state.version(subject, "latest").expect("it has a version");
        assert_eq!(versions.last(), Some(&latest.version));
        let _ = state.level_of(subject);
        for number in versions {
            // A number that Confluent's API cannot ask for.
            let Ok(version) = state.version(subject, &number.to_string()) else { continue };
            let id = version.id.to_string();
            assert_eq!(state.schema(&id), Ok(version.schema));
            assert!(state.users_of(&id).expect("it is there").contains(&(subject, number)));
            contents.push((subject.to_owned(), number, version.id, version.schema.to_owned()));
        }
    }
    contents
}

/// What is registered is found, and registered again it is the same.
fn register(state: &mut State, subject: &str, text: &str, is_compatible: bool) {
    let planned = match state.plan_register(subject, text) {
        Ok(planned) => planned,
        Err(error) => {
            assert!([409, 422, 500].contains(&error.status) && !error.message.is_empty(), "{error:?}");
            assert!(error.status != 409 || !is_compatible, "{error:?}");
            return;
        }
    };
    let Some((key, value)) = planned.record else { return };
    assert!(is_compatible, "`{subject}` takes a schema that does not fit");
    state.apply(&key, Some(&value));
    let found = state.lookup(subject, text).expect("it was registered");
    assert_eq!((Written::Id(found.id), found.schema), (planned.written, text));
    let again = state.plan_register(subject, text).expect("it is known");
    assert!(again.record.is_none() && again.written == Written::Id(found.id), "{again:?}");
}
