//! The text exposition format of Prometheus, version 0.0.4.

use crate::metrics::{Value, snapshot};
use std::fmt::Write;

/// The content type of [`render`].
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Renders every series as Prometheus reads it.
pub fn render() -> String {
    let mut out = String::with_capacity(16 * 1024);
    for family in snapshot() {
        let definition = family.definition;
        let name = definition.name;
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# HELP {name} {}", definition.help);
        let _ = writeln!(out, "# TYPE {name} {}", definition.kind.word());
        for (values, value) in &family.series {
            let labels = label_pairs(definition.labels, values);
            match value {
                Value::Counter(count) => line(&mut out, name, "", &labels, count),
                Value::Gauge(number) => line(&mut out, name, "", &labels, Number(*number)),
                Value::Histogram { bounds, counts, sum } => {
                    histogram(&mut out, name, &labels, bounds, counts, *sum);
                }
            }
        }
    }
    out
}

fn histogram(out: &mut String, name: &str, labels: &str, bounds: &[f64], counts: &[u64], sum: f64) {
    let mut total = 0;
    for (i, count) in counts.iter().enumerate() {
        total += count;
        let bound = bounds.get(i).copied().unwrap_or(f64::INFINITY);
        let separator = if labels.is_empty() { "" } else { "," };
        let with_bound = format!("{labels}{separator}le=\"{}\"", Number(bound));
        line(out, name, "_bucket", &with_bound, total);
    }
    line(out, name, "_sum", labels, Number(sum));
    line(out, name, "_count", labels, total);
}

fn line(out: &mut String, name: &str, suffix: &str, labels: &str, value: impl std::fmt::Display) {
    // Writing to a String cannot fail.
    let _ = if labels.is_empty() {
        writeln!(out, "{name}{suffix} {value}")
    } else {
        writeln!(out, "{name}{suffix}{{{labels}}} {value}")
    };
}

fn label_pairs(names: &[&str], values: &[Box<str>]) -> String {
    let mut out = String::new();
    for (i, (name, value)) in names.iter().zip(values).enumerate() {
        if i > 0 {
            out.push(',');
        }
        out.push_str(name);
        out.push_str("=\"");
        for c in value.chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                c => out.push(c),
            }
        }
        out.push('"');
    }
    out
}

/// A float as Prometheus spells it: `+Inf`, `-Inf`, `NaN`.
struct Number(f64);

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            f64::INFINITY => f.write_str("+Inf"),
            f64::NEG_INFINITY => f.write_str("-Inf"),
            number => write!(f, "{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Metric, counter, gauge, histogram};

    #[test]
    fn buckets_are_cumulative_and_end_at_infinity() {
        let age = histogram(Metric::MessageAgeSeconds, &[("stage", "text"), ("topic", "t")]);
        age.observe_n(0.004, 2);
        age.observe(1e9);
        let text = render();
        for expected in [
            "# TYPE message_age_seconds histogram\n",
            "message_age_seconds_bucket{stage=\"text\",topic=\"t\",le=\"0.005\"} 2\n",
            "message_age_seconds_bucket{stage=\"text\",topic=\"t\",le=\"604800\"} 2\n",
            "message_age_seconds_bucket{stage=\"text\",topic=\"t\",le=\"+Inf\"} 3\n",
            "message_age_seconds_sum{stage=\"text\",topic=\"t\"} 1000000000.008\n",
            "message_age_seconds_count{stage=\"text\",topic=\"t\"} 3\n",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
    }

    #[test]
    fn label_values_are_escaped() {
        counter(Metric::CommitsTotal, &[("stage", "a\"b\\c\nd")]).add(4);
        assert!(render().contains("commits_total{stage=\"a\\\"b\\\\c\\nd\"} 4\n"));
    }

    #[test]
    fn a_metric_without_labels_has_no_braces() {
        gauge(Metric::ProcessStartTimeSeconds, &[]).set(1.5);
        assert!(render().contains("\nprocess_start_time_seconds 1.5\n"));
    }
}
