//! Checks the CEL expressions of feeds: syntax, and every name in them.

use super::filter::Filter;
use crate::strict_toml::suggestion;
use cel::Env;
use cel::common::ast::{EntryExpr, Expr, IdedExpr};

/// What an expression may name.
pub const VARIABLES: [&str; 5] = ["payload", "element", "capture", "topic", "login"];

/// Keys of `login`.
const LOGIN_KEYS: [&str; 3] = ["client_id", "user", "site"];

/// Functions that the bridge adds to CEL's own: those of CEL's strings extension, then ours, which make a
/// text lower or upper case, a number of a text, and a value of JSON in a text.
pub const FEED_FUNCTIONS: [&str; 16] = [
    "charAt",
    "format",
    "indexOf",
    "join",
    "lastIndexOf",
    "lowerAscii",
    "replace",
    "reverse",
    "split",
    "substring",
    "trim",
    "upperAscii",
    "lower",
    "upper",
    "number",
    "json",
];

/// CEL's own functions and operators' names begin with `_` or `@` or are among these.
const CEL_FUNCTIONS: [&str; 29] = [
    "bool",
    "bytes",
    "contains",
    "double",
    "duration",
    "dyn",
    "endsWith",
    "getDate",
    "getDayOfMonth",
    "getDayOfWeek",
    "getDayOfYear",
    "getFullYear",
    "getHours",
    "getMilliseconds",
    "getMinutes",
    "getMonth",
    "getSeconds",
    "hasValue",
    "int",
    "matches",
    "optional",
    "or",
    "orValue",
    "size",
    "startsWith",
    "string",
    "timestamp",
    "type",
    "uint",
];

/// The longest expression in bytes: longer ones are programs, which belong into a stage.
const EXPRESSION_BYTES_MAX: usize = 4_096;

/// Deeper nesting is refused before it exhausts the stack.
const DEPTH_MAX: u16 = 48;

/// Checks one expression of a feed with `filter`.
///
/// # Errors
/// What is wrong, with line and column within the expression where the parser states them.
pub(super) fn check(text: &str, filter: &Filter) -> Result<(), String> {
    if text.len() > EXPRESSION_BYTES_MAX {
        return Err(format!("the expression is longer than {EXPRESSION_BYTES_MAX} bytes"));
    }
    let tree = Env::stdlib().parser().max_recursion_depth(DEPTH_MAX).parse(text).map_err(|errors| {
        let first = errors.errors.first();
        let (line, column) = first.map_or((0, 0), |e| e.pos);
        let what = first.map_or("it does not parse", |e| e.msg.as_str());
        format!("`{text}` is not an expression ({line}:{column}): {what}")
    })?;
    let captures: Vec<&str> = filter.captures().collect();
    let mut names = Names { captures: &captures, scope: Vec::new(), fault: None };
    names.walk(&tree);
    match names.fault {
        Some(what) => Err(format!("`{text}`: {what}")),
        None => Ok(()),
    }
}

struct Names<'a, 'e> {
    captures: &'a [&'a str],
    scope: Vec<&'e str>,
    fault: Option<String>,
}

impl<'e> Names<'_, 'e> {
    fn refuse(&mut self, what: String) {
        self.fault.get_or_insert(what);
    }

    fn walk(&mut self, tree: &'e IdedExpr) {
        match &tree.expr {
            Expr::Unspecified | Expr::Literal(_) => {}
            Expr::Ident(name) => self.variable(name),
            Expr::Select(select) => {
                self.key(&select.operand, &select.field);
                self.walk(&select.operand);
            }
            Expr::Call(call) => {
                self.function(&call.func_name);
                call.target.iter().for_each(|target| self.walk(target));
                call.args.iter().for_each(|argument| self.walk(argument));
            }
            Expr::List(list) => list.elements.iter().for_each(|element| self.walk(element)),
            Expr::Map(map) => map.entries.iter().for_each(|entry| self.entry(&entry.expr)),
            Expr::Struct(made) => self.refuse(format!("`{}` is not a known type", made.type_name)),
            Expr::Comprehension(over) => {
                self.walk(&over.iter_range);
                self.walk(&over.accu_init);
                let before = self.scope.len();
                self.scope.extend([over.iter_var.as_str(), over.accu_var.as_str()]);
                self.scope.extend(over.iter_var2.as_deref());
                self.walk(&over.loop_cond);
                self.walk(&over.loop_step);
                self.walk(&over.result);
                self.scope.truncate(before);
            }
        }
    }

    fn entry(&mut self, entry: &'e EntryExpr) {
        match entry {
            EntryExpr::StructField(field) => self.walk(&field.value),
            EntryExpr::MapEntry(entry) => {
                self.walk(&entry.key);
                self.walk(&entry.value);
            }
        }
    }

    fn variable(&mut self, name: &str) {
        let is_known = name.starts_with('@') || VARIABLES.contains(&name) || self.scope.contains(&name);
        // A type's name is a value too: `type(x) == string`.
        if !is_known && !CEL_FUNCTIONS.contains(&name) && !["list", "map", "null_type"].contains(&name) {
            let hint = suggestion(name, VARIABLES);
            self.refuse(format!("unknown name `{name}`{hint} (known: {})", VARIABLES.join(", ")));
        }
    }

    fn key(&mut self, operand: &IdedExpr, field: &str) {
        let Expr::Ident(root) = &operand.expr else { return };
        if self.scope.contains(&root.as_str()) {
            return;
        }
        let (known, what): (&[&str], &str) = match root.as_str() {
            "capture" => (self.captures, "the filter captures"),
            "login" => (&LOGIN_KEYS, "a login has"),
            _ => return,
        };
        if !known.contains(&field) {
            let hint = suggestion(field, known.iter().copied());
            let list = if known.is_empty() { "nothing".to_owned() } else { known.join(", ") };
            self.refuse(format!("`{root}.{field}` does not exist{hint} ({what} {list})"));
        }
    }

    fn function(&mut self, name: &str) {
        let is_operator = !name.starts_with(|c: char| c.is_ascii_alphabetic());
        let known = || CEL_FUNCTIONS.iter().chain(&FEED_FUNCTIONS).copied();
        if !is_operator
            && !known().any(|k| k == name)
            && !["of", "none", "ofNonZeroValue", "value", "optMap"].contains(&name)
        {
            self.refuse(format!("unknown function `{name}`{}", suggestion(name, known())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_syntax_are_checked_before_a_message_comes() {
        let filter: Filter = "a/{site}/{device}".parse().expect("a filter");
        for (text, fault) in [
            ("capture.site", None),
            ("'home'", None),
            ("payload.list.map(e, {'name': e.n, 'value': e.v})", None),
            ("has(payload.x) && payload.x > 3", None),
            ("payload['a-b'].size() > 0 ? payload['a-b'] : null", None),
            ("type(payload) == string", None),
            ("topic.split('/')[1] + lower(login.user)", None),
            ("payload.exists(e, e == 'x')", None),
            ("{'name': payload.n, ?'unit': payload.?u}", None),
            (
                "capture.sit",
                Some("`capture.sit` does not exist; did you mean `site`? (the filter captures site, device)"),
            ),
            ("paylod.x", Some("unknown name `paylod`; did you mean `payload`?")),
            ("login.name", Some("`login.name` does not exist")),
            ("payload.x +", Some("is not an expression (1:")),
            ("lowr(topic)", Some("unknown function `lowr`; did you mean `lower`?")),
            ("payload.map(e, f.x)", Some("unknown name `f`")),
        ] {
            match (check(text, &filter), fault) {
                (Ok(()), None) => {}
                (Err(what), Some(expected)) => assert!(what.contains(expected), "{text}: {what}"),
                (found, _) => panic!("{text}: {found:?}"),
            }
        }
    }
}
