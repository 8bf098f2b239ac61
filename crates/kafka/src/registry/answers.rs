//! What a registry answers, read without a connection. Another program wrote it: it may have any form, and
//! what is repeated of it is short and one line.

use super::{RegistryError, SubjectVersion};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use throughline_runtime::ports::Failure;

/// How much of a text of the registry an error repeats.
const TEXT_BYTES_MAX: usize = 4_096;
/// How many reasons of one refusal are repeated.
const REASONS_MAX: usize = 64;

const SUBJECT_NOT_FOUND: i64 = 40_401;
const VERSION_NOT_FOUND: i64 = 40_402;
const SCHEMA_NOT_FOUND: i64 = 40_403;

/// An answer as it came.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// The registry's address.
    pub url: &'a str,
    /// What was asked.
    pub what: &'a str,
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: &'a str,
}

#[derive(Deserialize)]
struct Id {
    id: u32,
}

#[derive(Deserialize)]
struct Text {
    schema: String,
}

#[derive(Deserialize)]
struct Compatible {
    is_compatible: bool,
    #[serde(default)]
    messages: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Refusal {
    error_code: i64,
    message: String,
}

/// What was asked for, or the registry's word that there is none.
enum Found<T> {
    There(T),
    Missing(Refusal),
}

impl<T> Found<T> {
    fn there(self) -> Option<T> {
        match self {
            Self::There(found) => Some(found),
            Self::Missing(_) => None,
        }
    }
}

impl Answer<'_> {
    /// Reads the text of a schema, `None` where there is none.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn schema(&self) -> Result<Option<String>, RegistryError> {
        Ok(self.read::<Text>(object)?.there().map(|text| text.schema))
    }

    /// Reads the text of a schema for a stage, to which "there is none" is the word that dead-letters records.
    ///
    /// # Errors
    /// [`Failure::Dependency`] also where an address that is no registry's says that nothing is there.
    pub fn schema_for_a_stage(&self) -> Result<Option<String>, Failure> {
        match self.read::<Text>(object)? {
            Found::There(text) => Ok(Some(text.schema)),
            Found::Missing(refusal) if refusal.error_code == SCHEMA_NOT_FOUND => Ok(None),
            Found::Missing(refusal) => Err(Failure::Dependency {
                dependency: "registry",
                message: format!("{} is not at {}: {}", self.what, self.url, brief(&refusal.message)),
            }),
        }
    }

    /// Reads the id of a schema that was registered.
    ///
    /// # Errors
    /// [`RegistryError`]; also where there is none.
    pub fn id(&self) -> Result<u32, RegistryError> {
        Ok(self.present::<Id>(object)?.id)
    }

    /// Reads the id of a schema that was looked up, `None` where there is none.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn id_if_any(&self) -> Result<Option<u32>, RegistryError> {
        Ok(self.read::<Id>(object)?.there().map(|found| found.id))
    }

    /// Reads whether a schema may follow: `Err` holds the reasons why not, at least one. `None` where the
    /// registry does not know the question.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn compatible(&self) -> Result<Option<Result<(), Vec<String>>>, RegistryError> {
        Ok(match self.read::<Compatible>(object)? {
            Found::There(found) if found.is_compatible => Some(Ok(())),
            Found::There(found) => Some(Err(reasons(&found.messages))),
            // There is nothing that it could break.
            Found::Missing(r) if [SUBJECT_NOT_FOUND, VERSION_NOT_FOUND].contains(&r.error_code) => {
                Some(Ok(()))
            }
            Found::Missing(_) => None,
        })
    }

    /// Reads a version of a subject, `None` where there is none.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn version(&self) -> Result<Option<SubjectVersion>, RegistryError> {
        Ok(self.read(object)?.there())
    }

    /// Reads the names of subjects.
    ///
    /// # Errors
    /// [`RegistryError`]; also where there is no list.
    pub fn subjects(&self) -> Result<Vec<String>, RegistryError> {
        self.present(|body| serde_json::from_str(body))
    }

    /// Reads that something was done.
    ///
    /// # Errors
    /// [`RegistryError`]; also where what it was about is not there.
    pub fn done(&self) -> Result<(), RegistryError> {
        self.present::<Value>(|body| serde_json::from_str(body)).map(drop)
    }

    /// Says that the registry lacks something altogether.
    pub(super) fn absent(&self, message: &str) -> RegistryError {
        self.refused(Refusal { message: message.to_owned(), ..Refusal::default() })
    }

    fn present<T>(&self, parse: fn(&str) -> serde_json::Result<T>) -> Result<T, RegistryError> {
        match self.read(parse)? {
            Found::There(found) => Ok(found),
            Found::Missing(refusal) => Err(self.refused(refusal)),
        }
    }

    fn read<T>(&self, parse: fn(&str) -> serde_json::Result<T>) -> Result<Found<T>, RegistryError> {
        let Self { url, what, status, body } = *self;
        let refusal = || object::<Refusal>(body).unwrap_or_default();
        let unavailable = |message| RegistryError::Unavailable { url: url.to_owned(), message };
        match status {
            200..300 => parse(body).map(Found::There).map_err(|e| {
                unavailable(format!("its answer about {what} cannot be read: {}", brief(&e.to_string())))
            }),
            // A path that is unknown altogether is missing too, with no code of the registry's own.
            404 | 405 => Ok(Found::Missing(refusal())),
            408 | 425 | 429 | 500.. => {
                Err(unavailable(format!("HTTP {status} on {what}: {}", brief(&refusal().message))))
            }
            _ => Err(self.refused(refusal())),
        }
    }

    fn refused(&self, refusal: Refusal) -> RegistryError {
        let (what, status) = (self.what.to_owned(), self.status);
        RegistryError::Refused { what, status, code: refusal.error_code, message: brief(&refusal.message) }
    }
}

/// Reads a JSON object. Straight into a struct, serde would take a list for one too, by the order of fields.
fn object<T: DeserializeOwned>(body: &str) -> serde_json::Result<T> {
    T::deserialize(Value::Object(serde_json::from_str(body)?))
}

/// Returns what the registry said against a schema, at least one sentence.
fn reasons(messages: &[String]) -> Vec<String> {
    let mut reasons: Vec<String> = messages.iter().take(REASONS_MAX).map(|reason| brief(reason)).collect();
    if messages.is_empty() {
        reasons.push("no reason given".to_owned());
    }
    if messages.len() > REASONS_MAX {
        reasons.push(format!("and {} more", messages.len() - REASONS_MAX));
    }
    reasons
}

/// Returns a text of the registry as one line of at most [`TEXT_BYTES_MAX`].
fn brief(text: &str) -> String {
    let end = text.floor_char_boundary(TEXT_BYTES_MAX);
    let more = if end < text.len() { " …" } else { "" };
    let line: String = text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("{}{more}", line.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text() -> impl Strategy<Value = String> {
        // JSON of the fields that are read, of fields that are not, and what is no JSON at all.
        let value = prop_oneof![
            Just("null".to_owned()),
            "-?[0-9]{1,20}",
            "4040[1-4]",
            "(true|false)",
            "\"[ -!#-\\[\\]-~]{0,12}\"",
            Just(format!("\"{}\"", "x".repeat(100_000))),
            Just(r#"["a\n\u0000b"]"#.to_owned()),
            "\\[{0,200}",
        ];
        let name = "(id|schema|version|is_compatible|messages|error_code|message|other)";
        let object = prop::collection::vec((name, value), 0..5).prop_map(|fields| {
            let fields: Vec<String> =
                fields.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
            format!("{{{}}}", fields.join(","))
        });
        let subjects = prop::collection::vec("[ -!#-\\[\\]-~]{0,8}", 0..4);
        prop_oneof![
            object,
            subjects.prop_map(|names| serde_json::to_string(&names).expect("texts are JSON")),
            any::<String>(),
            Just("<html>not a registry</html>".to_owned()),
        ]
    }

    proptest! {
        #[test]
        fn an_answer_of_any_form_is_read_or_told_in_short(
            status in prop_oneof![100u16..=999, prop::sample::select(vec![200, 204, 404, 405, 409, 422, 429, 503])],
            body in text(),
        ) {
            let answer = Answer { url: "http://r", what: "schema 7", status, body: &body };
            let succeeded = (200..300).contains(&status);
            let known: Value = serde_json::from_str(&body).unwrap_or_default();
            let errors = [
                answer.schema().map(|text| assert_eq!(text.as_deref(), known["schema"].as_str().filter(|_| succeeded))),
                answer.id().map(|id| assert!(succeeded && known["id"] == id)),
                answer.id_if_any().map(|id| assert_eq!(id.map(u64::from), known["id"].as_u64().filter(|_| succeeded))),
                answer.version().map(|version| assert!(version.is_none_or(|v| known["version"] == v.version))),
                answer.subjects().map(|names| assert!(succeeded && known == serde_json::json!(names))),
                answer.done().map(|()| assert!(succeeded)),
                answer.compatible().map(|verdict| {
                    let refused = verdict.and_then(Result::err);
                    assert!(refused.is_none_or(|why| !why.is_empty() && why.len() <= REASONS_MAX + 1));
                }),
            ];
            for error in errors.into_iter().filter_map(Result::err) {
                let shown = error.to_string();
                prop_assert!(shown.len() <= TEXT_BYTES_MAX + 256, "{} bytes", shown.len());
                prop_assert!(!shown.contains(char::is_control), "{shown:?}");
                let again = [408, 425, 429].contains(&status) || status >= 500 || succeeded;
                let is_dependency = matches!(Failure::from(error), Failure::Dependency { .. });
                prop_assert_eq!(is_dependency, again, "{}", shown);
            }
            // Only the registry's own word that there is no such schema may dead-letter what carries its id.
            match answer.schema_for_a_stage() {
                Ok(Some(text)) => prop_assert_eq!(Some(&*text), known["schema"].as_str()),
                Ok(None) => prop_assert!([404, 405].contains(&status) && known["error_code"] == SCHEMA_NOT_FOUND),
                Err(failure) => prop_assert!(failure.to_string().len() <= TEXT_BYTES_MAX + 256),
            }
        }
    }

    #[test]
    fn reasons_that_nobody_would_read_are_counted() {
        let many = serde_json::json!({ "is_compatible": false, "messages": vec!["a\nb"; 70] }).to_string();
        let answer = Answer { url: "", what: "", status: 200, body: &many };
        let reasons = answer.compatible().expect("it reads").expect("an answer").expect_err("not compatible");
        assert_eq!((reasons.len(), &*reasons[0], &*reasons[64]), (65, "a b", "and 6 more"));
    }
}
