//! A schema registry that speaks Confluent's REST API.

pub mod answers;

use answers::Answer;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use throughline_runtime::ports::{Failure, SchemaSource};
use ureq::Agent;

/// How long one request may take: a lookup that takes longer is an outage to a stage.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Confluent's content type; the plain JSON type is accepted in answers.
const CONTENT_TYPE: &str = "application/vnd.schemaregistry.v1+json";

/// Where the registry is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// The base address, for instance `http://127.0.0.1:8081` or `https://host/apis/ccompat/v7`.
    pub url: String,
    /// The value of the `Authorization` header, where one is needed.
    pub authorization: Option<String>,
}

/// A schema as registered under a subject.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct SubjectVersion {
    /// The schema's id, which values carry.
    pub id: u32,
    /// Its version within the subject, from 1.
    pub version: u32,
    /// The schema's text.
    pub schema: String,
}

/// Why the registry did not do it.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// It cannot be reached or failed itself: try again.
    #[error("the schema registry at {url} cannot be used: {message}")]
    Unavailable {
        /// The registry's address.
        url: String,
        /// What went wrong.
        message: String,
    },
    /// It refused: incompatible, invalid, not allowed.
    #[error("the schema registry refuses {what}: {message} (HTTP {status}, code {code})")]
    Refused {
        /// What was asked.
        what: String,
        /// The HTTP status.
        status: u16,
        /// The registry's own code.
        code: i64,
        /// What it said.
        message: String,
    },
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Unavailable { .. } => {
                Self::Dependency { dependency: "registry", message: error.to_string() }
            }
            RegistryError::Refused { .. } => {
                Self::Stop { code: "TL-REGISTRY-001", message: error.to_string() }
            }
        }
    }
}

/// A client of one registry. Blocking; cheap to clone.
#[derive(Clone, Debug)]
pub struct RegistryClient {
    agent: Agent,
    url: String,
    authorization: Option<String>,
}

impl RegistryClient {
    /// Prepares a client; does not connect.
    pub fn new(config: &RegistryConfig) -> Self {
        let agent = Agent::config_builder()
            .timeout_global(Some(REQUEST_TIMEOUT))
            .http_status_as_error(false)
            .build()
            .new_agent();
        let url = config.url.trim_end_matches('/').to_owned();
        Self { agent, url, authorization: config.authorization.clone() }
    }

    /// Returns the text of the schema `id`, or `None` where the registry does not know it.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn schema(&self, id: u32) -> Result<Option<String>, RegistryError> {
        self.get(&format!("/schemas/ids/{id}"), &format!("schema {id}"), |answer| answer.schema())
    }

    /// Registers an Avro schema under a subject and returns its id; the same schema keeps its id.
    ///
    /// # Errors
    /// [`RegistryError::Refused`] with status 409 where readers of earlier versions would break, 422 where
    /// the text is not Avro.
    pub fn register(&self, subject: &str, schema: &str) -> Result<u32, RegistryError> {
        let path = format!("/subjects/{}/versions", escape(subject));
        let what = format!("a schema for subject `{subject}`");
        self.send("POST", &path, &what, &avro(schema), |answer| answer.id())
    }

    /// Returns the id under which the registry holds exactly this schema for the subject, without registering
    /// anything; `None` where it does not.
    ///
    /// # Errors
    /// When the registry cannot be asked or refuses the text.
    pub fn lookup(&self, subject: &str, schema: &str) -> Result<Option<u32>, RegistryError> {
        let path = format!("/subjects/{}", escape(subject));
        let what = format!("a look-up for subject `{subject}`");
        self.send("POST", &path, &what, &avro(schema), |answer| answer.id_if_any())
    }

    /// Says whether a schema may be registered under a subject: `Err` holds the reasons why readers would
    /// break. A subject without versions takes any schema.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn check(&self, subject: &str, schema: &str) -> Result<Result<(), Vec<String>>, RegistryError> {
        let what = format!("a compatibility check for subject `{subject}`");
        let base = format!("/compatibility/subjects/{}/versions", escape(subject));
        // All versions first, as the transitive modes do; registries without that path check the latest.
        for path in [format!("{base}?verbose=true"), format!("{base}/latest?verbose=true")] {
            let answer = self.send("POST", &path, &what, &avro(schema), |answer| answer.compatible())?;
            if let Some(verdict) = answer {
                return Ok(verdict);
            }
        }
        let nothing = Answer { url: &self.url, what: &what, status: 404, body: "" };
        Err(nothing.absent("it has no compatibility API"))
    }

    /// Returns the newest version of a subject, or `None` where there is none.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn latest(&self, subject: &str) -> Result<Option<SubjectVersion>, RegistryError> {
        let path = format!("/subjects/{}/versions/latest", escape(subject));
        self.get(&path, &format!("subject `{subject}`"), |answer| answer.version())
    }

    /// Returns the names of all subjects.
    ///
    /// # Errors
    /// [`RegistryError`]; also the cheapest way to see whether the registry can be used.
    pub fn subjects(&self) -> Result<Vec<String>, RegistryError> {
        self.get("/subjects", "the list of subjects", |answer| answer.subjects())
    }

    /// Sets how strictly a subject's versions must fit each other, for instance `FULL_TRANSITIVE`.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn set_compatibility(&self, subject: &str, level: &str) -> Result<(), RegistryError> {
        let what = format!("compatibility `{level}` for subject `{subject}`");
        let body = serde_json::json!({ "compatibility": level });
        let path = format!("/config/{}", escape(subject));
        self.send("PUT", &path, &what, &body, |answer| answer.done())
    }

    fn get<T, E: From<RegistryError>>(
        &self,
        path: &str,
        what: &str,
        read: impl FnOnce(Answer<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut request = self.agent.get(format!("{}{path}", self.url)).header("Accept", CONTENT_TYPE);
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.hear(request.call(), what, read)
    }

    fn send<T>(
        &self,
        method: &str,
        path: &str,
        what: &str,
        body: &serde_json::Value,
        read: impl FnOnce(Answer<'_>) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let url = format!("{}{path}", self.url);
        let mut request = if method == "PUT" { self.agent.put(url) } else { self.agent.post(url) }
            .header("Accept", CONTENT_TYPE)
            .header("Content-Type", CONTENT_TYPE);
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.hear(request.send(body.to_string()), what, read)
    }

    fn hear<T, E: From<RegistryError>>(
        &self,
        response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
        what: &str,
        read: impl FnOnce(Answer<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut response = response.map_err(|e| self.unavailable(&e))?;
        let status = response.status().as_u16();
        let body = response.body_mut().read_to_string().map_err(|e| self.unavailable(&e))?;
        read(Answer { url: &self.url, what, status, body: &body })
    }

    fn unavailable(&self, error: &ureq::Error) -> RegistryError {
        RegistryError::Unavailable { url: self.url.clone(), message: error.to_string() }
    }
}

impl SchemaSource for RegistryClient {
    fn fetch(&mut self, id: u32) -> Result<Option<String>, Failure> {
        self.get(&format!("/schemas/ids/{id}"), &format!("schema {id}"), |answer| answer.schema_for_a_stage())
    }
}

fn avro(schema: &str) -> serde_json::Value {
    serde_json::json!({ "schema": schema, "schemaType": "AVRO" })
}

/// Escapes a path segment (RFC 3986).
fn escape(segment: &str) -> String {
    let mut escaped = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => escaped.push(byte.into()),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;

    /// Answers each request in turn and returns what was asked.
    fn registry(answers: Vec<(u16, &'static str)>) -> (RegistryClient, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let mut asked = Vec::new();
            for (status, body) in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut line, mut length) = (String::new(), 0);
                reader.read_line(&mut line).unwrap();
                loop {
                    let mut header = String::new();
                    reader.read_line(&mut header).unwrap();
                    if let Some(n) = header.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = n.trim().parse().unwrap();
                    }
                    if header.trim().is_empty() {
                        break;
                    }
                }
                let mut sent = vec![0; length];
                reader.read_exact(&mut sent).unwrap();
                asked.push(format!("{} {}", line.trim(), String::from_utf8(sent).unwrap()));
                let length = body.len();
                write!(
                    stream,
                    "HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                )
                .unwrap();
            }
            asked
        });
        let config = RegistryConfig { url, authorization: None };
        (RegistryClient::new(&config), server)
    }

    #[test]
    fn an_unknown_schema_is_none_and_a_wrong_address_is_a_dependency() {
        let (mut client, server) = registry(vec![
            (200, r#"{"schema":"\"string\""}"#),
            (404, r#"{"error_code":40403,"message":"Schema not found"}"#),
            (404, "<html>not a registry</html>"),
            (503, ""),
        ]);
        assert_eq!(client.fetch(1).unwrap(), Some("\"string\"".to_owned()));
        assert_eq!(client.fetch(2).unwrap(), None);
        for id in [3, 4] {
            let down = client.fetch(id).unwrap_err();
            assert!(matches!(down, Failure::Dependency { dependency: "registry", .. }), "{down}");
        }
        assert_eq!(server.join().unwrap()[0], "GET /schemas/ids/1 HTTP/1.1 ");
    }

    #[test]
    fn a_registry_without_the_transitive_check_is_asked_about_the_latest_version() {
        let (client, server) = registry(vec![
            (404, r#"{"error_code":404,"message":"HTTP 404 Not Found"}"#),
            (200, r#"{"is_compatible":false,"messages":["field gone"]}"#),
            (404, r#"{"error_code":40401,"message":"Subject not found"}"#),
        ]);
        assert_eq!(client.check("t-value", "{}").unwrap(), Err(vec!["field gone".to_owned()]));
        assert_eq!(client.check("new-value", "{}").unwrap(), Ok(()));
        let asked = server.join().unwrap();
        assert!(asked[1].starts_with("POST /compatibility/subjects/t-value/versions/latest?verbose=true"));
    }

    #[test]
    fn an_incompatible_schema_is_refused_with_the_registrys_reason() {
        let (client, server) = registry(vec![(409, r#"{"error_code":409,"message":"incompatible"}"#)]);
        let refused = client.register("a b", "{}").unwrap_err();
        assert!(matches!(refused, RegistryError::Refused { status: 409, .. }), "{refused}");
        assert!(matches!(Failure::from(refused), Failure::Stop { code: "TL-REGISTRY-001", .. }));
        assert!(server.join().unwrap()[0].starts_with("POST /subjects/a%20b/versions HTTP/1.1 {"));
    }
}
