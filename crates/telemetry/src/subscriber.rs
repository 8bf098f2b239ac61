//! Sets up logs, traces and the OTLP export of a process, once.

use crate::otlp;
use crate::spans;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use serde::{Deserialize, Serialize};
use std::io::IsTerminal;
use tracing_subscriber::filter::{EnvFilter, FilterExt, LevelFilter, Targets, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Text for people on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// Text for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The `[telemetry]` section of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// What is logged, in the syntax of `RUST_LOG`: `info`, `warn,throughline_kafka=debug`.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Base address of an OTLP receiver over HTTP, for instance `http://127.0.0.1:4318`. Without it nothing
    /// is exported.
    pub otlp_endpoint: Option<String>,
    /// Share of traces that is exported, 0 to 1. Spans that failed and spans of commands always are.
    pub trace_ratio: f64,
    /// Seconds between two exports of metrics.
    pub metrics_interval_seconds: u64,
    /// `service.name` of traces and metrics.
    pub service_name: String,
    /// `service.instance.id`: which of several instances this is.
    pub instance: String,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            log: "info".to_owned(),
            log_format: LogFormat::Auto,
            otlp_endpoint: None,
            trace_ratio: 0.01,
            metrics_interval_seconds: 10,
            service_name: "throughline".to_owned(),
            instance: std::process::id().to_string(),
        }
    }
}

/// Why telemetry cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error(
        "telemetry.log = `{filter}` is no log filter: {message}; examples: `info`, `warn,throughline_kafka=debug`"
    )]
    Filter {
        /// What was configured.
        filter: String,
        /// What is wrong with it.
        message: String,
    },
    /// The OTLP endpoint cannot be used.
    #[error("telemetry.otlp_endpoint = `{endpoint}` cannot be used: {message}")]
    Endpoint {
        /// What was configured.
        endpoint: String,
        /// What is wrong with it.
        message: String,
    },
    /// The sampling ratio is not between 0 and 1.
    #[error("telemetry.trace_ratio = {0} is not between 0 and 1")]
    Ratio(f64),
    /// Another subscriber is installed already.
    #[error("telemetry is set up already in this process")]
    Twice,
}

/// Keeps the exporters alive; dropping it sends what they still hold, waiting at most 5 s for each.
#[derive(Debug, Default)]
pub struct TelemetryGuard {
    traces: Option<SdkTracerProvider>,
    metrics: Option<otlp::MetricsExporter>,
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        if let Some(metrics) = self.metrics.take() {
            metrics.stop();
        }
        if let Some(traces) = self.traces.take()
            && let Err(error) = traces.shutdown_with_timeout(otlp::TIMEOUT)
        {
            tracing::warn!(%error, "some spans could not be exported");
        }
    }
}

/// Installs the subscriber of this process: log lines on stderr and, with an endpoint, traces and metrics
/// over OTLP.
///
/// # Errors
/// When a setting cannot be used, or when it was called before.
pub fn init(config: &TelemetryConfig) -> Result<TelemetryGuard, TelemetryError> {
    if !(0.0..=1.0).contains(&config.trace_ratio) {
        return Err(TelemetryError::Ratio(config.trace_ratio));
    }
    let log = log_layer(config)?;
    let traces = config.otlp_endpoint.as_deref().map(|endpoint| otlp::tracer_provider(endpoint, config));
    let traces = traces.transpose()?;
    let trace_layer = traces.as_ref().map(|provider| {
        let tracer = provider.tracer("throughline");
        tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_location(false)
            .with_threads(false)
            .with_filter(Targets::new().with_target(spans::TARGET, LevelFilter::INFO))
    });
    tracing_subscriber::registry()
        .with(log)
        .with(trace_layer)
        .try_init()
        .map_err(|_| TelemetryError::Twice)?;
    let metrics =
        config.otlp_endpoint.as_deref().map(|endpoint| otlp::MetricsExporter::start(endpoint, config));
    Ok(TelemetryGuard { traces, metrics: metrics.transpose()? })
}

fn log_layer<S>(config: &TelemetryConfig) -> Result<Box<dyn Layer<S> + Send + Sync>, TelemetryError>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|error| TelemetryError::Filter { filter: config.log.clone(), message: error.to_string() })?;
    // Batch spans are for the trace exporter; in log lines they would repeat the fields of the event.
    let filter = filter.and(filter_fn(|metadata| metadata.target() != spans::TARGET));
    let terminal = std::io::stderr().is_terminal();
    let json = match config.log_format {
        LogFormat::Auto => !terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    if json {
        return Ok(layer.json().flatten_event(true).with_filter(filter).boxed());
    }
    let colours = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    Ok(layer.with_ansi(colours).with_target(false).with_filter(filter).boxed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_used_are_named() {
        let check = |config: TelemetryConfig, expected: &str| {
            let message = init(&config).expect_err("it shall be refused").to_string();
            assert!(message.starts_with(expected), "{message}");
        };
        let config = TelemetryConfig::default;
        check(
            TelemetryConfig { log: "a=b=c".to_owned(), ..config() },
            "telemetry.log = `a=b=c` is no log filter: ",
        );
        check(
            TelemetryConfig { trace_ratio: 2.0, ..config() },
            "telemetry.trace_ratio = 2 is not between 0 and 1",
        );
        check(
            TelemetryConfig { otlp_endpoint: Some("localhost:4318".to_owned()), ..config() },
            "telemetry.otlp_endpoint = `localhost:4318` cannot be used: ",
        );
    }
}
