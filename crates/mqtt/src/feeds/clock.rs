//! Times as devices write them.

use jiff::civil::DateTime;
use jiff::tz::{Offset, TimeZone};
use throughline_model::time::Timestamp;

/// Reads a number of seconds, milliseconds, microseconds or nanoseconds since the Unix epoch. The unit
/// follows from the magnitude: below 10^11 seconds (year 5138), below 10^14 milliseconds, below 10^17
/// microseconds, else nanoseconds. Device times lie after 1973, where the ranges do not overlap.
pub fn from_integer(n: i64) -> Timestamp {
    let magnitude = n.unsigned_abs();
    Timestamp(if magnitude < 100_000_000_000 {
        n * 1_000_000
    } else if magnitude < 100_000_000_000_000 {
        n * 1_000
    } else if magnitude < 100_000_000_000_000_000 {
        n
    } else {
        n.div_euclid(1_000)
    })
}

/// Reads a number with a fraction, see [`from_integer`]; rounds to the microsecond.
pub fn from_float(n: f64) -> Option<Timestamp> {
    if !n.is_finite() || n.abs() > 9.2e18 {
        return None;
    }
    let scale = match n.abs() {
        m if m < 1e11 => 1e6,
        m if m < 1e14 => 1e3,
        m if m < 1e17 => 1.0,
        _ => 1e-3,
    };
    Some(Timestamp((n * scale).round() as i64))
}

/// Reads a JSON number.
pub fn from_json_number(written: &str) -> Option<Timestamp> {
    match written.parse::<i64>() {
        Ok(n) => Some(from_integer(n)),
        Err(_) => written.parse::<f64>().ok().and_then(from_float),
    }
}

/// Reads RFC 3339, or a date and time without a zone where `zone` says which it is in.
pub fn from_text(text: &str, zone: Option<&TimeZone>) -> Option<Timestamp> {
    let text = text.trim();
    if let Ok(instant) = text.parse::<jiff::Timestamp>() {
        return Some(Timestamp(instant.as_microsecond()));
    }
    let local: DateTime = text.parse().ok()?;
    let zoned = local.to_zoned(zone?.clone()).ok()?;
    Some(Timestamp(zoned.timestamp().as_microsecond()))
}

/// Finds a zone: an IANA name, `UTC`, or an offset such as `+02:00`.
///
/// # Errors
/// Says what is accepted.
pub fn zone(name: &str) -> Result<TimeZone, String> {
    if name == "UTC" || name == "Z" {
        return Ok(TimeZone::UTC);
    }
    if let Some(offset) = fixed_offset(name) {
        return Ok(TimeZone::fixed(offset));
    }
    TimeZone::get(name)
        .map_err(|e| format!("`{name}` is not a time zone (an IANA name, `UTC` or `+02:00`): {e}"))
}

fn fixed_offset(name: &str) -> Option<Offset> {
    let (sign, rest) = match name.split_at_checked(1)? {
        ("+", rest) => (1, rest),
        ("-", rest) => (-1, rest),
        _ => return None,
    };
    let (hours, minutes) = rest.split_once(':')?;
    let hours: i32 = hours.parse().ok().filter(|h| *h < 24)?;
    let minutes: i32 = minutes.parse().ok().filter(|m| *m < 60)?;
    Offset::from_seconds(sign * (hours * 3600 + minutes * 60)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_told_apart_by_magnitude() {
        for (written, micros) in [
            ("1769853600", 1_769_853_600_000_000),
            ("1769853600123", 1_769_853_600_123_000),
            ("1769853600123456", 1_769_853_600_123_456),
            ("1769853600123456789", 1_769_853_600_123_456),
            ("1769853600.5", 1_769_853_600_500_000),
            ("1769853600.123456", 1_769_853_600_123_456),
            ("1.7698536e9", 1_769_853_600_000_000),
            ("-1", -1_000_000),
        ] {
            assert_eq!(from_json_number(written), Some(Timestamp(micros)), "{written}");
        }
        assert_eq!(from_json_number("1e300"), None);
    }

    #[test]
    fn texts_carry_their_zone_or_take_the_feeds() {
        let berlin = zone("+01:00").expect("an offset");
        for (text, zone, micros) in [
            ("2026-01-31T10:00:00.123456Z", None, Some(1_769_853_600_123_456)),
            ("2026-01-31T11:00:00+01:00", None, Some(1_769_853_600_000_000)),
            ("2026-01-31T11:00:00", Some(&berlin), Some(1_769_853_600_000_000)),
            ("2026-01-31 11:00:00", Some(&berlin), Some(1_769_853_600_000_000)),
            ("2026-01-31T11:00:00", None, None),
            ("yesterday", Some(&berlin), None),
        ] {
            assert_eq!(from_text(text, zone), micros.map(Timestamp), "{text}");
        }
        assert!(zone("Nowhere/At_All").expect_err("no such zone").contains("IANA"));
    }
}
