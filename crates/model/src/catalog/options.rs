//! Checks the options of decoders, so that a wrong one is found where it is written and not by the first
//! message. The bridge reads payloads.

use super::feed::{Decoder, FeedSpec};

/// A key of the topic file and what is wrong with it.
pub(super) type Fault = (&'static str, String);

/// Returns every fault of the decoder's options.
pub(super) fn check(spec: &FeedSpec) -> Vec<Fault> {
    let mut faults = misplaced(spec);
    let own = match spec.decoder {
        Decoder::Native | Decoder::Json | Decoder::Number | Decoder::Text => Ok(()),
        Decoder::Csv => csv(spec),
        Decoder::KeyValue => pairs(spec),
        Decoder::Pattern => pattern(spec),
        Decoder::Binary => layout(spec),
    };
    faults.extend(own.err());
    let is_bare = matches!(spec.decoder, Decoder::Number | Decoder::Text);
    if is_bare && spec.measurement.is_none() && spec.measurements.is_none() {
        let what = "a bare value needs a name: `measurement = \"capture.name\"` or `measurement = \"'temperature'\"`";
        faults.push(("decoder", what.to_owned()));
    }
    if spec.measurement.is_some() && spec.measurements.is_some() {
        faults.push((
            "measurement",
            "`measurement` names a single value; with `measurements` it says nothing".to_owned(),
        ));
    }
    faults
}

/// Options of another decoder would silently do nothing.
fn misplaced(spec: &FeedSpec) -> Vec<Fault> {
    use Decoder::{Binary, Csv, KeyValue, Pattern};
    let options: [(&str, bool, &[Decoder], &str); 4] = [
        ("columns", !spec.columns.is_empty(), &[Csv], "`csv`"),
        ("separator", spec.separator.is_some(), &[Csv, KeyValue], "`csv` and `key_value`"),
        ("pattern", spec.pattern.is_some(), &[Pattern], "`pattern`"),
        ("layout", !spec.layout.is_empty(), &[Binary], "`binary`"),
    ];
    options
        .into_iter()
        .filter(|(_, given, decoders, _)| *given && !decoders.contains(&spec.decoder))
        .map(|(key, _, _, names)| (key, format!("`{key}` belongs to the decoder {names}")))
        .collect()
}

fn csv(spec: &FeedSpec) -> Result<(), Fault> {
    let separator = spec.separator.as_deref().unwrap_or(",");
    if separator.len() != 1 || !separator.is_ascii() || separator == "\"" {
        return Err(("separator", "`separator` of csv is one ASCII character".to_owned()));
    }
    match spec.columns.iter().enumerate().find(|(i, column)| spec.columns[..*i].contains(column)) {
        Some((_, column)) => Err(("columns", format!("the column `{column}` is named twice"))),
        None => Ok(()),
    }
}

fn pairs(spec: &FeedSpec) -> Result<(), Fault> {
    let separator = spec.separator.as_deref().unwrap_or(",");
    if separator.is_empty() || separator.contains('=') {
        let what = "`separator` is what stands between pairs; it is not empty and has no `=`";
        return Err(("separator", what.to_owned()));
    }
    Ok(())
}

fn pattern(spec: &FeedSpec) -> Result<(), Fault> {
    let Some(text) = &spec.pattern else {
        return Err(("decoder", "the decoder pattern needs `pattern`".to_owned()));
    };
    let pattern = regex::Regex::new(text).map_err(|e| {
        let message = e.to_string();
        let reason = message.lines().last().unwrap_or_default().trim_start_matches("error: ");
        ("pattern", format!("`{text}` is not a regular expression: {reason}"))
    })?;
    if pattern.capture_names().flatten().next().is_none() {
        return Err(("pattern", "`pattern` names no group: write `(?<temperature>[0-9.]+)`".to_owned()));
    }
    Ok(())
}

fn layout(spec: &FeedSpec) -> Result<(), Fault> {
    if spec.layout.is_empty() {
        return Err(("decoder", "the decoder binary needs `layout`".to_owned()));
    }
    let mut names: Vec<&str> = Vec::new();
    for entry in &spec.layout {
        if !is_field(entry) {
            let what = format!(
                "`{entry}` is not a field: write `name:type` such as `temperature:i16be`, or `skip4`"
            );
            return Err(("layout", what));
        }
        if let Some((name, _)) = entry.split_once(':') {
            if names.contains(&name) {
                return Err(("layout", format!("the field `{name}` is named twice")));
            }
            names.push(name);
        }
    }
    Ok(())
}

fn is_field(entry: &str) -> bool {
    const ORDERED: [&str; 10] = ["u16", "i16", "u24", "i24", "u32", "i32", "u64", "i64", "f32", "f64"];
    if let Some(count) = entry.strip_prefix("skip") {
        return count.parse::<u16>().is_ok_and(|n| n > 0);
    }
    let Some((name, of)) = entry.split_once(':') else { return false };
    let width = of.strip_suffix("be").or_else(|| of.strip_suffix("le"));
    !name.is_empty() && (matches!(of, "u8" | "i8") || width.is_some_and(|w| ORDERED.contains(&w)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_options_name_their_key() {
        for (options, key) in [
            ("decoder = 'json'", None),
            ("decoder = 'csv'\nseparator = ';;'", Some("separator")),
            ("decoder = 'csv'\ncolumns = ['a', 'a']", Some("columns")),
            ("decoder = 'json'\ncolumns = ['a']", Some("columns")),
            ("decoder = 'number'", Some("decoder")),
            ("decoder = 'number'\nmeasurement = 'capture.x'", None),
            ("decoder = 'key_value'\nseparator = '='", Some("separator")),
            ("decoder = 'pattern'", Some("decoder")),
            ("decoder = 'pattern'\npattern = '('", Some("pattern")),
            ("decoder = 'pattern'\npattern = 'x'", Some("pattern")),
            ("decoder = 'pattern'\npattern = '(?<x>y)'", None),
            ("decoder = 'binary'", Some("decoder")),
            ("decoder = 'binary'\nlayout = ['t:i16']", Some("layout")),
            ("decoder = 'binary'\nlayout = ['t:é']", Some("layout")),
            ("decoder = 'binary'\nlayout = ['t:u8', 't:u8']", Some("layout")),
            ("decoder = 'binary'\nlayout = ['t:u8', 'skip3', 'v:f64le']", None),
            ("decoder = 'json'\nmeasurement = \"'x'\"\nmeasurements = 'payload'", Some("measurement")),
        ] {
            let text = format!("name = 'f'\nfilter = 'x/{{device}}'\n{options}");
            let spec = crate::strict_toml::parse::<FeedSpec>("f", &text).expect("a feed");
            assert_eq!(check(&spec).first().map(|(key, _)| *key), key, "{options}");
        }
    }
}
