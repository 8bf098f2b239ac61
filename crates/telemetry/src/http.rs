//! `/metrics`, `/healthz`, `/readyz` and `/v1/status` of a process.
//!
//! All four answer from memory and at once, so they also answer while Kafka and the database are down.

use crate::health::Health;
use crate::text;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use std::future::Future;
use tokio::net::TcpListener;

/// Makes the routes; merge them into a role's own router or [`serve`] them alone.
pub fn router(health: Health) -> Router {
    Router::new()
        .route("/metrics", get(async || ([(header::CONTENT_TYPE, text::CONTENT_TYPE)], text::render())))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/v1/status", get(async |State(health): State<Health>| Json(health.status())))
        .with_state(health)
}

/// Serves [`router`] until `shutdown` is done; open requests are answered first.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    health: Health,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    axum::serve(listener, router(health)).with_graceful_shutdown(shutdown).await
}

async fn healthz(State(health): State<Health>) -> Response {
    verdict(&health.stuck())
}

async fn readyz(State(health): State<Health>) -> Response {
    verdict(&health.unready())
}

fn verdict(complaints: &[String]) -> Response {
    if complaints.is_empty() {
        return (StatusCode::OK, "ok\n").into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", complaints.join("\n"))).into_response()
}
