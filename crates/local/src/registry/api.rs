//! Confluent's REST API over the state.
//!
//! Source: the API reference of Confluent Schema Registry 7. Deletion is refused: a schema id that records
//! in Kafka carry must stay readable.

use super::compatibility::Level;
use super::state::{ApiError, State, Written};
use super::{Change, Job};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, State as Shared};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// The content type of every answer.
const CONTENT_TYPE: &str = "application/vnd.schemaregistry.v1+json";

/// The largest request; catalog schemas have a few KiB.
const BODY_BYTES_MAX: usize = 1024 * 1024;

#[derive(Clone)]
struct Api {
    state: Arc<RwLock<State>>,
    jobs: mpsc::Sender<Job>,
}

type Answer = Result<Response, ApiError>;

/// Makes the routes.
pub(super) fn router(state: Arc<RwLock<State>>, jobs: mpsc::Sender<Job>) -> Router {
    Router::new()
        .route("/", get(async || answer(&json!({}))))
        .route("/subjects", get(subjects))
        .route("/subjects/{subject}", post(lookup).delete(refuse_deletion))
        .route("/subjects/{subject}/versions", get(versions).post(register))
        .route("/subjects/{subject}/versions/{version}", get(version).delete(refuse_deletion))
        .route("/subjects/{subject}/versions/{version}/schema", get(version_schema))
        .route("/schemas/types", get(async || answer(&["AVRO"])))
        .route("/schemas/ids/{id}", get(schema))
        .route("/schemas/ids/{id}/schema", get(schema_text))
        .route("/schemas/ids/{id}/subjects", get(schema_subjects))
        .route("/schemas/ids/{id}/versions", get(schema_versions))
        .route("/compatibility/subjects/{subject}/versions", post(check_all))
        .route("/compatibility/subjects/{subject}/versions/{version}", post(check_one))
        .route("/config", get(level).put(set_level))
        .route("/config/{subject}", get(subject_level).put(set_subject_level))
        .route("/mode", get(async || answer(&json!({ "mode": "READWRITE" }))))
        .fallback(async || ApiError::new(404, 404, "HTTP 404 Not Found"))
        .method_not_allowed_fallback(async || ApiError::new(405, 405, "HTTP 405 Method Not Allowed"))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(Api { state, jobs })
}

async fn subjects(Shared(api): Shared<Api>) -> Answer {
    Ok(answer(&api.state.read().subjects()))
}

async fn versions(Shared(api): Shared<Api>, Path(subject): Path<String>) -> Answer {
    Ok(answer(&api.state.read().versions(&subject)?))
}

async fn version(Shared(api): Shared<Api>, Path((subject, version)): Path<(String, String)>) -> Answer {
    Ok(answer(&api.state.read().version(&subject, &version)?))
}

async fn version_schema(
    Shared(api): Shared<Api>,
    Path((subject, version)): Path<(String, String)>,
) -> Answer {
    Ok(raw(api.state.read().version(&subject, &version)?.schema))
}

async fn schema(Shared(api): Shared<Api>, Path(id): Path<String>) -> Answer {
    Ok(answer(&json!({ "schema": api.state.read().schema(&id)? })))
}

async fn schema_text(Shared(api): Shared<Api>, Path(id): Path<String>) -> Answer {
    Ok(raw(api.state.read().schema(&id)?))
}

async fn schema_subjects(Shared(api): Shared<Api>, Path(id): Path<String>) -> Answer {
    let state = api.state.read();
    let mut subjects: Vec<_> = state.users_of(&id)?.into_iter().map(|(subject, _)| subject).collect();
    subjects.dedup();
    Ok(answer(&subjects))
}

async fn schema_versions(Shared(api): Shared<Api>, Path(id): Path<String>) -> Answer {
    let state = api.state.read();
    let users = state.users_of(&id)?.into_iter();
    let users: Vec<Value> =
        users.map(|(subject, version)| json!({ "subject": subject, "version": version })).collect();
    Ok(answer(&users))
}

async fn lookup(Shared(api): Shared<Api>, Path(subject): Path<String>, body: Bytes) -> Answer {
    let request = schema_request(&body)?;
    Ok(answer(&api.state.read().lookup(&subject, &request.schema)?))
}

async fn register(Shared(api): Shared<Api>, Path(subject): Path<String>, body: Bytes) -> Answer {
    let schema = schema_request(&body)?.schema;
    match write(&api, Change::Register { subject, schema }).await? {
        Written::Id(id) => Ok(answer(&json!({ "id": id }))),
        Written::Level(level) => Ok(answer(&json!({ "compatibility": level }))),
    }
}

/// The parameters of a request; those that this registry does not know are left out of account.
type Parameters = Query<HashMap<String, String>>;

/// Says whether a parameter is set; Java clients write `true`, Python's `True`.
fn is_set(parameters: &Parameters, name: &str) -> bool {
    parameters.get(name).is_some_and(|value| value.eq_ignore_ascii_case("true"))
}

async fn check_all(
    Shared(api): Shared<Api>,
    Path(subject): Path<String>,
    parameters: Parameters,
    body: Bytes,
) -> Answer {
    let schema = schema_request(&body)?.schema;
    let complaints = api.state.read().check(&subject, None, &schema)?;
    Ok(compatible(&complaints, is_set(&parameters, "verbose")))
}

async fn check_one(
    Shared(api): Shared<Api>,
    Path((subject, version)): Path<(String, String)>,
    parameters: Parameters,
    body: Bytes,
) -> Answer {
    let schema = schema_request(&body)?.schema;
    let complaints = api.state.read().check(&subject, Some(&version), &schema)?;
    Ok(compatible(&complaints, is_set(&parameters, "verbose")))
}

fn compatible(complaints: &[String], verbose: bool) -> Response {
    let mut value = json!({ "is_compatible": complaints.is_empty() });
    if verbose {
        value["messages"] = json!(complaints);
    }
    answer(&value)
}

async fn level(Shared(api): Shared<Api>) -> Answer {
    Ok(answer(&json!({ "compatibilityLevel": api.state.read().level() })))
}

async fn subject_level(
    Shared(api): Shared<Api>,
    Path(subject): Path<String>,
    parameters: Parameters,
) -> Answer {
    let state = api.state.read();
    let own = state.own_level(&subject);
    let inherited = is_set(&parameters, "defaultToGlobal").then(|| state.level_of(&subject));
    let level = own.or(inherited);
    let level = level.ok_or_else(|| {
        let message = format!("Subject '{subject}' does not have subject-level compatibility configured");
        ApiError::new(404, 40408, message)
    })?;
    Ok(answer(&json!({ "compatibilityLevel": level })))
}

async fn set_level(Shared(api): Shared<Api>, body: Bytes) -> Answer {
    change_level(&api, None, &body).await
}

async fn set_subject_level(Shared(api): Shared<Api>, Path(subject): Path<String>, body: Bytes) -> Answer {
    change_level(&api, Some(subject), &body).await
}

async fn change_level(api: &Api, subject: Option<String>, body: &[u8]) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        compatibility: Level,
    }
    let invalid = |_| {
        let message = "Invalid compatibility level. Valid values are none, backward, forward, full, \
                       backward_transitive, forward_transitive, and full_transitive";
        ApiError::new(422, 42203, message)
    };
    let request: Request = serde_json::from_slice(body).map_err(invalid)?;
    write(api, Change::SetLevel { subject, level: request.compatibility }).await?;
    Ok(answer(&json!({ "compatibility": request.compatibility })))
}

async fn refuse_deletion() -> ApiError {
    let message = "Deletion is refused: records in Kafka may carry the schema's id. To begin anew, remove the data \
                   directory; to break with a schema, add a new major version of the topic";
    ApiError::new(422, 42205, message)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SchemaRequest {
    schema: String,
    schema_type: Option<String>,
    #[serde(default)]
    references: Option<Vec<Value>>,
}

fn schema_request(body: &[u8]) -> Result<SchemaRequest, ApiError> {
    let request: SchemaRequest = serde_json::from_slice(body)
        .map_err(|error| ApiError::new(400, 400, format!("Unable to process JSON: {error}")))?;
    let avro = request.schema_type.as_deref().is_none_or(|kind| kind == "AVRO");
    if !avro || request.references.as_ref().is_some_and(|references| !references.is_empty()) {
        let message = "Invalid schema: this registry takes Avro schemas without references";
        return Err(ApiError::new(422, 42201, message));
    }
    Ok(request)
}

async fn write(api: &Api, change: Change) -> Result<Written, ApiError> {
    let busy = || ApiError::new(503, 50301, "Too many writes wait for Kafka");
    let gone = || ApiError::new(500, 50001, "Error in the backend data store: the registry is stopping");
    let (answer, answered) = oneshot::channel();
    api.jobs.try_send(Job { change, answer }).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => busy(),
        mpsc::error::TrySendError::Closed(_) => gone(),
    })?;
    answered.await.map_err(|_| gone())?
}

fn answer(value: &(impl Serialize + ?Sized)) -> Response {
    let body =
        serde_json::to_string(value).expect("answers hold strings and numbers, which always serialise");
    raw(&body)
}

fn raw(body: &str) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], body.to_owned()).into_response()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).expect("statuses are written in this crate");
        (status, answer(&json!({ "error_code": self.code, "message": self.message }))).into_response()
    }
}
