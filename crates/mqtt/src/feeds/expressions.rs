//! Feeds that are not native: CEL expressions over the decoded payload pick what the record needs.

use super::decode::{Decode, map};
use super::functions::Functions;
use super::{Publish, Reject, clock};
use crate::json::{DEPTH_MAX, Json};
use crate::values::Values;
use cel::objects::Key;
use cel::{Context, Env, Program, Value};
use jiff::tz::TimeZone;
use std::collections::HashMap;
use std::sync::Arc;
use throughline_model::catalog::{Decoder, FeedSpec};
use throughline_model::time::Timestamp;

/// A compiled feed.
pub struct Expressions {
    spec: FeedSpec,
    decode: Decode,
    programs: HashMap<&'static str, Program>,
    zone: Option<TimeZone>,
    env: Arc<Env>,
    functions: Functions,
}

/// What the expressions picked for one element; its measurements are in the [`Values`] beside it.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the fields are those of the envelope")]
pub struct Picked {
    pub site: String,
    pub device: String,
    pub epoch: Option<i64>,
    pub seq: Option<i64>,
    pub time: Option<Timestamp>,
    pub trace_id: Option<String>,
    pub request_id: Option<String>,
    pub request_code: Option<String>,
    pub response_code: Option<String>,
    pub reason: Option<String>,
}

/// A decoded payload with its elements.
pub struct Decoded {
    payload: Value,
    elements: Vec<(Value, Vec<u8>)>,
    raw_json: bool,
}

impl Decoded {
    /// Returns the number of elements, each of which becomes one record.
    pub fn count(&self) -> usize {
        self.elements.len()
    }

    /// Returns the bytes that identify the element: its raw slice of the payload, or, where an expression
    /// made it, its canonical form.
    pub fn element_bytes(&self, index: usize) -> &[u8] {
        &self.elements[index].1
    }
}

impl Expressions {
    /// Compiles a feed.
    ///
    /// # Errors
    /// Says which key is wrong and why.
    pub fn compile(spec: &FeedSpec) -> Result<Self, String> {
        let mut env = Env::stdlib();
        env.add_extension(cel::extensions::strings).map_err(|e| format!("the CEL environment: {e}"))?;
        let env = Arc::new(env);
        let mut programs = HashMap::new();
        for (key, expression) in spec.expressions() {
            let program = env.compile(expression).map_err(|e| format!("`{key}`: {e}"))?;
            programs.insert(key, program);
        }
        if spec.site.is_none() {
            return Err("`site` is missing: an expression says where the site comes from".to_owned());
        }
        if spec.device.is_none() && !spec.filter.captures().any(|name| name == "device") {
            return Err("`device` is missing, and the filter captures no `{device}`".to_owned());
        }
        if spec.time.is_some() && spec.time_zone.is_none() {
            return Err("`time_zone` is missing: `time` needs the zone of times that carry none".to_owned());
        }
        let zone = spec.time_zone.as_deref().map(clock::zone).transpose()?;
        let functions = Functions::used_by(programs.values());
        Ok(Self { spec: spec.clone(), decode: Decode::compile(spec)?, programs, zone, env, functions })
    }

    /// Decodes the payload; `None` where `when` says that the message is not this feed's.
    ///
    /// # Errors
    /// [`Reject`] with a stable code.
    pub fn decode(
        &self,
        publish: &Publish<'_>,
        captured: &[(&str, &str)],
    ) -> Result<Option<Decoded>, Reject> {
        let payload = self.decode.decode(publish.payload)?;
        let context = self.context(publish, captured, &payload, None);
        if let Some(value) = self.evaluate("when", &context)? {
            match value {
                Value::Bool(true) => {}
                Value::Bool(false) => return Ok(None),
                other => return Err(self.wrong("when", "a boolean", &other)),
            }
        }
        let raw_json = self.spec.decoder == Decoder::Json && !self.programs.contains_key("each");
        let elements = match self.evaluate("each", &context)? {
            Some(Value::List(list)) => list.iter().map(|e| (e.clone(), canonical(e))).collect(),
            Some(other) => return Err(self.wrong("each", "a list", &other)),
            None => match &payload {
                Value::List(list) if raw_json => {
                    let slices = raw_elements(publish.payload);
                    list.iter().cloned().zip(slices).collect()
                }
                Value::List(list) => list.iter().map(|e| (e.clone(), canonical(e))).collect(),
                whole => vec![(whole.clone(), publish.payload.trim_ascii().to_vec())],
            },
        };
        Ok(Some(Decoded { payload, elements, raw_json }))
    }

    /// Evaluates the expressions for one element; `values` are cleared first and then hold its
    /// measurements.
    ///
    /// # Errors
    /// [`Reject`] names the key and what was wrong.
    pub fn pick(
        &self,
        publish: &Publish<'_>,
        captured: &[(&str, &str)],
        decoded: &Decoded,
        index: usize,
        values: &mut Values,
    ) -> Result<Picked, Reject> {
        let (element, bytes) = &decoded.elements[index];
        let context = self.context(publish, captured, &decoded.payload, Some(element));
        let device = match self.optional_text("device", &context)? {
            Some(device) => device,
            None => captured
                .iter()
                .find(|(name, _)| *name == "device")
                .map(|(_, v)| (*v).to_owned())
                .unwrap_or_default(),
        };
        let picked = Picked {
            site: self.optional_text("site", &context)?.unwrap_or_default(),
            device,
            epoch: self.counter("epoch", &context)?,
            seq: self.counter("seq", &context)?,
            time: self.time(&context)?,
            trace_id: self.optional_text("trace_id", &context)?,
            request_id: self.optional_text("request_id", &context)?,
            request_code: self.optional_text("request_code", &context)?,
            response_code: self.optional_text("response_code", &context)?,
            reason: self.optional_text("reason", &context)?,
        };
        values.clear();
        match self.evaluate("measurements", &context)? {
            Some(value) => self.measure(&value, &context, values)?,
            None if decoded.raw_json && matches!(element, Value::Map(_) | Value::List(_)) => {
                let text = std::str::from_utf8(bytes).unwrap_or_default();
                values.flatten(&mut Json::new(text), 0).map_err(Reject::value)?;
            }
            None => self.measure(element, &context, values)?,
        }
        if !self.spec.exclude.is_empty() {
            values.retain(|name| !self.spec.excludes(name));
        }
        if !self.spec.units.is_empty() {
            values.add_units(&self.spec.units);
        }
        Ok(picked)
    }

    fn context(
        &self,
        publish: &Publish<'_>,
        captured: &[(&str, &str)],
        payload: &Value,
        element: Option<&Value>,
    ) -> Context<'static, 'static> {
        let mut context = Context::with_env(Arc::clone(&self.env));
        self.functions.add(&mut context);
        context.add_variable_from_value("payload", payload.clone());
        context.add_variable_from_value("element", element.unwrap_or(payload).clone());
        context.add_variable_from_value("topic", publish.topic);
        context.add_variable_from_value("capture", map(captured.iter().map(|(k, v)| (*k, Value::from(*v)))));
        let login =
            [("client_id", Some(publish.client_id)), ("user", publish.user), ("site", publish.login_site)];
        let login = login.into_iter().filter_map(|(k, v)| v.map(|v| (k, Value::from(v))));
        context.add_variable_from_value("login", map(login));
        context
    }

    fn evaluate(&self, key: &'static str, context: &Context<'_, '_>) -> Result<Option<Value>, Reject> {
        let Some(program) = self.programs.get(key) else { return Ok(None) };
        match program.execute(context) {
            Ok(Value::Null) => Ok(None),
            Ok(value) => Ok(Some(value)),
            Err(e) => Err(Reject::new(
                "feed_expression",
                format!("feed `{}`: `{key}` cannot be evaluated: {e}", self.spec.name),
            )),
        }
    }

    fn wrong(&self, key: &str, expected: &str, found: &Value) -> Reject {
        let found = found.type_of();
        Reject::new(
            "feed_expression_type",
            format!("feed `{}`: `{key}` must yield {expected}, not {found}", self.spec.name),
        )
    }

    fn optional_text(&self, key: &'static str, context: &Context<'_, '_>) -> Result<Option<String>, Reject> {
        match self.evaluate(key, context)? {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.to_string())),
            Some(Value::Int(n)) => Ok(Some(n.to_string())),
            Some(Value::UInt(n)) => Ok(Some(n.to_string())),
            Some(other) => Err(self.wrong(key, "a string", &other)),
        }
    }

    fn counter(&self, key: &'static str, context: &Context<'_, '_>) -> Result<Option<i64>, Reject> {
        match self.evaluate(key, context)? {
            None => Ok(None),
            Some(Value::Int(n)) if n >= 0 => Ok(Some(n)),
            Some(Value::UInt(n)) if n <= i64::MAX as u64 => Ok(Some(n as i64)),
            Some(Value::Float(f)) if f >= 0.0 && f.fract() == 0.0 && f < 9.2e18 => Ok(Some(f as i64)),
            Some(other) => Err(self.wrong(key, "an integer from 0", &other)),
        }
    }

    fn time(&self, context: &Context<'_, '_>) -> Result<Option<Timestamp>, Reject> {
        let time = match self.evaluate("time", context)? {
            None => return Ok(None),
            Some(Value::Int(n)) => Some(clock::from_integer(n)),
            Some(Value::UInt(n)) => i64::try_from(n).ok().map(clock::from_integer),
            Some(Value::Float(f)) => clock::from_float(f),
            Some(Value::String(text)) => clock::from_text(&text, self.zone.as_ref()),
            Some(Value::Timestamp(t)) => Some(Timestamp(t.timestamp_micros())),
            Some(other) => return Err(self.wrong("time", "a time", &other)),
        };
        let message = || format!("feed `{}`: `time` yields neither RFC 3339 nor a Unix time", self.spec.name);
        time.map(Some).ok_or_else(|| Reject::new("ts_invalid", message()))
    }

    fn measure(&self, value: &Value, context: &Context<'_, '_>, values: &mut Values) -> Result<(), Reject> {
        match value {
            Value::Map(_) => self.flatten(value, 0, values),
            Value::List(list) => {
                for entry in list.iter() {
                    self.named(entry, values)?;
                }
                Ok(())
            }
            scalar => {
                let name = self.optional_text("measurement", context)?;
                let before = values.enter(name.as_deref().unwrap_or("value"));
                self.flatten(scalar, 1, values)?;
                values.leave(before);
                Ok(())
            }
        }
    }

    /// Adds one `{name, value, unit}`.
    fn named(&self, entry: &Value, values: &mut Values) -> Result<(), Reject> {
        let wrong = || self.wrong("measurements", "a map, or a list of maps with `name` and `value`", entry);
        let Value::Map(fields) = entry else { return Err(wrong()) };
        let field = |key: &str| fields.map.get(&Key::String(Arc::new(key.to_owned())));
        let (Some(Value::String(name)), Some(value)) = (field("name"), field("value")) else {
            return Err(wrong());
        };
        let before = values.enter(name);
        self.flatten(value, 1, values)?;
        values.leave(before);
        if let Some(Value::String(unit)) = field("unit") {
            values.set_unit(unit);
        }
        Ok(())
    }

    fn flatten(&self, value: &Value, depth: usize, values: &mut Values) -> Result<(), Reject> {
        if depth > DEPTH_MAX {
            return Err(Reject::new("payload_too_deep", "measurements are nested too deep".to_owned()));
        }
        match value {
            Value::Map(fields) => {
                for (key, inner) in sorted(fields) {
                    let before = values.enter(&key);
                    self.flatten(inner, depth + 1, values)?;
                    values.leave(before);
                }
            }
            Value::List(list) => {
                for (index, inner) in list.iter().enumerate() {
                    let before = values.enter(&index.to_string());
                    self.flatten(inner, depth + 1, values)?;
                    values.leave(before);
                }
            }
            Value::Int(n) => values.push_integer(i128::from(*n)),
            Value::UInt(n) => values.push_integer(i128::from(*n)),
            Value::Float(n) => values.push_number(*n).map_err(Reject::value)?,
            Value::String(text) => values.push_text(text),
            Value::Bool(flag) => values.push_flag(*flag),
            Value::Null => values.push_null(),
            other => return Err(self.wrong("measurements", "numbers, texts and booleans", other)),
        }
        Ok(())
    }
}

/// Returns the entries of a map by key, so that a record does not depend on the order of a hash table.
fn sorted(fields: &cel::objects::Map) -> Vec<(String, &Value)> {
    let mut entries: Vec<(String, &Value)> = fields.map.iter().map(|(k, v)| (k.to_string(), v)).collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    entries
}

/// Returns bytes that are equal for equal values: JSON with sorted keys.
fn canonical(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    write_canonical(value, &mut out);
    out
}

fn write_canonical(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Map(fields) => {
            out.push(b'{');
            for (key, inner) in sorted(fields) {
                out.extend_from_slice(&(key.len() as u64).to_be_bytes());
                out.extend_from_slice(key.as_bytes());
                write_canonical(inner, out);
            }
            out.push(b'}');
        }
        Value::List(list) => {
            out.push(b'[');
            for inner in list.iter() {
                write_canonical(inner, out);
                out.push(b',');
            }
            out.push(b']');
        }
        scalar => out.extend_from_slice(format!("{scalar:?}").as_bytes()),
    }
}

/// Returns the raw slices of a JSON list's elements; the text was decoded before, so it is valid.
fn raw_elements(payload: &[u8]) -> Vec<Vec<u8>> {
    let text = std::str::from_utf8(payload).unwrap_or_default();
    let mut json = Json::new(text);
    let mut slices = Vec::new();
    let mut first = true;
    if json.token().is_err() {
        return slices;
    }
    while let Ok(true) = json.next_element(&mut first) {
        json.peek();
        let start = json.position();
        if json.skip().is_err() {
            break;
        }
        slices.push(json.since(start).as_bytes().to_vec());
    }
    slices
}
