//! Checks an expression in full and compiles it: names, functions and types.
//!
//! What type a measurement has is told by how it is used; two uses that contradict each other are refused.
//! `when` and `clear_when` of a rule share one [`Types`].

use super::expression::{Expression, ExpressionError, Names, Parsed, parse};
use super::program::{Arithmetic, Compare, Fact, Flag, Integer, Number, Operand, Text};
use crate::strict_toml::suggestion;
use cel::common::ast::{CallExpr, Expr, IdedExpr, LiteralValue, operators};
use hashbrown::HashMap;

/// How deep an expression may be after parsing.
const DEPTH_MAX: usize = 64;
const FUNCTIONS: [&str; 8] = ["abs", "contains", "endsWith", "has", "max", "min", "size", "startsWith"];
const DEVICE_FACTS: [(&str, Fact); 4] = [
    ("site", Fact::Site),
    ("id", Fact::Device),
    ("agent_version", Fact::AgentVersion),
    ("config_version", Fact::ConfigVersion),
];

/// The type of a value as far as operands must agree on it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Number,
    Text,
    Flag,
}

impl Kind {
    fn noun(self) -> &'static str {
        match self {
            Self::Number => "a number",
            Self::Text => "text",
            Self::Flag => "a truth value",
        }
    }
}

/// What is known of the measurements' types: sets of slots that have one type, and that type with the
/// place that told it.
#[derive(Debug, Default)]
pub(super) struct Types {
    parents: HashMap<u32, u32>,
    kinds: HashMap<u32, (Kind, String)>,
}

impl Types {
    fn root(&self, slot: u32) -> u32 {
        let mut at = slot;
        while let Some(parent) = self.parents.get(&at) {
            at = *parent;
        }
        at
    }

    fn known(&self, slot: u32) -> Option<&(Kind, String)> {
        self.kinds.get(&self.root(slot))
    }

    fn learn(&mut self, slot: u32, kind: Kind, place: String) {
        self.kinds.insert(self.root(slot), (kind, place));
    }

    fn join(&mut self, a: u32, b: u32) {
        let (a, b) = (self.root(a), self.root(b));
        if a != b {
            self.parents.insert(a, b);
        }
    }
}

/// A compiled expression of any type.
enum Typed {
    Number(Number),
    Integer(Integer),
    Text(Text),
    Flag(Flag),
    /// A measurement whose type nothing has told yet.
    Open(Operand),
}

impl Typed {
    fn kind(&self) -> Option<Kind> {
        match self {
            Self::Number(_) | Self::Integer(_) => Some(Kind::Number),
            Self::Text(_) => Some(Kind::Text),
            Self::Flag(_) => Some(Kind::Flag),
            Self::Open(_) => None,
        }
    }
}

/// What a name stands for.
enum Name {
    Measurement { name: String, before: bool },
    Fact(Fact),
}

type Checked<T> = Result<T, ExpressionError>;

/// Parses, checks and compiles `text`; measurements' types are told by and kept in `types`.
pub(super) fn compile(text: &str, names: &mut Names, types: &mut Types) -> Checked<Expression> {
    let parsed = parse(text)?;
    let mut checker =
        Checker { parsed: &parsed, names, types, now: vec![], before: vec![], mentioned: vec![] };
    let root = checker.flag(&parsed.root, 0)?;
    let Checker { now, before, mentioned, .. } = checker;
    Ok(Expression { root, now, before, names: mentioned })
}

struct Checker<'c, 't> {
    parsed: &'c Parsed<'t>,
    names: &'c mut Names,
    types: &'c mut Types,
    now: Vec<u32>,
    before: Vec<u32>,
    mentioned: Vec<Box<str>>,
}

impl Checker<'_, '_> {
    fn error(&self, at: &IdedExpr, what: impl Into<String>) -> ExpressionError {
        self.parsed.error(place_of(at), what)
    }

    fn unfit(&self, at: &IdedExpr, found: Kind, wanted: Kind) -> ExpressionError {
        let message = format!("does not fit: {} stands where {} is needed", found.noun(), wanted.noun());
        self.error(at, message)
    }

    fn flag(&mut self, expr: &IdedExpr, depth: usize) -> Checked<Flag> {
        match self.typed(expr, Some(Kind::Flag), depth)? {
            Typed::Flag(flag) => Ok(flag),
            other => Err(self.unfit(expr, other.kind().unwrap_or(Kind::Flag), Kind::Flag)),
        }
    }

    fn text(&mut self, expr: &IdedExpr, depth: usize) -> Checked<Text> {
        match self.typed(expr, Some(Kind::Text), depth)? {
            Typed::Text(text) => Ok(text),
            other => Err(self.unfit(expr, other.kind().unwrap_or(Kind::Text), Kind::Text)),
        }
    }

    /// Compiles a number, which is an integer where nothing but integers takes part.
    fn numeric(&mut self, expr: &IdedExpr, depth: usize) -> Checked<Typed> {
        let typed = self.typed(expr, Some(Kind::Number), depth)?;
        match typed.kind() {
            Some(Kind::Number) => Ok(typed),
            other => Err(self.unfit(expr, other.unwrap_or(Kind::Number), Kind::Number)),
        }
    }

    /// Compiles an expression. `wanted` is the type that its place needs; it decides the type of a
    /// measurement, and only of that, so the caller still checks what comes back.
    fn typed(&mut self, expr: &IdedExpr, wanted: Option<Kind>, depth: usize) -> Checked<Typed> {
        if depth > DEPTH_MAX {
            return Err(self.error(expr, format!("it is nested deeper than {DEPTH_MAX} levels")));
        }
        match &expr.expr {
            Expr::Literal(literal) => self.literal(expr, literal),
            Expr::Call(call) if call.func_name != operators::INDEX => self.call(expr, call, wanted, depth),
            Expr::Ident(_) | Expr::Select(_) | Expr::Call(_) => match self.name(expr)? {
                Name::Fact(fact) => Ok(Typed::Text(Text::Fact(fact))),
                Name::Measurement { name, before } => self.measurement(expr, &name, before, wanted),
            },
            Expr::List(_) => Err(self.error(expr, "a list stands only on the right of `in`")),
            Expr::Map(_) | Expr::Struct(_) => {
                Err(self.error(expr, "maps and messages are outside the subset of rules"))
            }
            Expr::Comprehension(_) | Expr::Unspecified => {
                Err(self.error(expr, "this is outside the subset of rules"))
            }
        }
    }

    fn literal(&self, expr: &IdedExpr, literal: &LiteralValue) -> Checked<Typed> {
        Ok(match literal {
            LiteralValue::Boolean(b) => Typed::Flag(Flag::Constant(*b.inner())),
            LiteralValue::Double(d) => Typed::Number(Number::Constant(*d.inner())),
            LiteralValue::Int(i) => Typed::Integer(Integer::Constant(*i.inner())),
            LiteralValue::String(s) => Typed::Text(Text::Constant(s.inner().into())),
            LiteralValue::UInt(_) => {
                return Err(self.error(expr, "unsigned literals are outside the subset: drop the `u`"));
            }
            LiteralValue::Bytes(_) => return Err(self.error(expr, "bytes are outside the subset of rules")),
            LiteralValue::Null => {
                return Err(self.error(expr, "null is outside the subset: `has(name)` asks for presence"));
            }
        })
    }

    /// Says what an identifier, a selection or an index names.
    fn name(&self, expr: &IdedExpr) -> Checked<Name> {
        if let Expr::Call(call) = &expr.expr {
            return self.indexed_name(expr, call);
        }
        let segments = self.segments(expr)?;
        match segments.as_slice() {
            ["stream"] => Ok(Name::Fact(Fact::Stream)),
            ["device", fact] => {
                let known = DEVICE_FACTS.iter().find(|(name, _)| name == fact);
                known.map(|(_, f)| Name::Fact(*f)).ok_or_else(|| self.unknown_fact(expr, fact))
            }
            ["device", ..] => Err(self.error(
                expr,
                format!(
                    "`device` is not a value: {} are; a measurement of that name is `m[\"device\"]`",
                    facts()
                ),
            )),
            ["previous" | "m"] => Err(self.error(
                expr,
                format!("`{0}` is not a value: write `{0}.name` or `{0}[\"name\"]`", segments[0]),
            )),
            ["m", rest @ ..] => Ok(Name::Measurement { name: rest.join("."), before: false }),
            ["previous", rest @ ..] => Ok(Name::Measurement { name: rest.join("."), before: true }),
            ["stream", ..] => Err(self.error(expr, "`stream` is text and has no fields")),
            _ => Ok(Name::Measurement { name: segments.join("."), before: false }),
        }
    }

    fn segments<'e>(&self, expr: &'e IdedExpr) -> Checked<Vec<&'e str>> {
        let mut segments = Vec::new();
        let mut at = expr;
        loop {
            match &at.expr {
                Expr::Select(select) if !select.test => {
                    segments.push(select.field.as_str());
                    at = &select.operand;
                }
                Expr::Ident(name) if name.starts_with('.') => {
                    return Err(self.error(at, "a name does not begin with a dot"));
                }
                Expr::Ident(name) => {
                    segments.push(name.as_str());
                    segments.reverse();
                    return Ok(segments);
                }
                _ => return Err(self.error(at, "only a name has fields")),
            }
        }
    }

    fn indexed_name(&self, expr: &IdedExpr, call: &CallExpr) -> Checked<Name> {
        let [base, index] = call.args.as_slice() else {
            return Err(self.error(expr, "an index has one element"));
        };
        let before = match &base.expr {
            Expr::Ident(name) if name == "m" => false,
            Expr::Ident(name) if name == "previous" => true,
            _ => {
                let help = "only `m[\"name\"]` and `previous[\"name\"]` take an index; a dotted name is one name: `m[\"a.b\"]`";
                return Err(self.error(base, help));
            }
        };
        match &index.expr {
            Expr::Literal(LiteralValue::String(name)) if !name.inner().is_empty() => {
                Ok(Name::Measurement { name: name.inner().to_owned(), before })
            }
            _ => Err(self.error(index, "the name of a measurement is a text literal that is not empty")),
        }
    }

    fn unknown_fact(&self, expr: &IdedExpr, fact: &str) -> ExpressionError {
        let hint = suggestion(fact, DEVICE_FACTS.iter().map(|(name, _)| *name));
        self.error(expr, format!("unknown name `device.{fact}`{hint} (known: {})", facts()))
    }

    fn operand(&mut self, name: &str, before: bool) -> Operand {
        let slot = self.names.slot_or_new(name);
        let (list, operand) = if before {
            (&mut self.before, Operand::Before(slot))
        } else {
            (&mut self.now, Operand::Now(slot))
        };
        if !list.contains(&slot) {
            list.push(slot);
            if !before {
                self.mentioned.push(name.into());
            }
        }
        operand
    }

    fn measurement(
        &mut self,
        expr: &IdedExpr,
        name: &str,
        before: bool,
        wanted: Option<Kind>,
    ) -> Checked<Typed> {
        let operand = self.operand(name, before);
        let known = self.types.known(operand.slot()).cloned();
        let kind = match (known, wanted) {
            (Some((known, place)), Some(wanted)) if known != wanted => {
                return Err(self.error(
                    expr,
                    format!(
                        "does not fit: `{name}` stands where {} is needed, but is used as {} at {place}",
                        wanted.noun(),
                        known.noun(),
                    ),
                ));
            }
            (Some((known, _)), _) => known,
            (None, Some(wanted)) => {
                let place = self.parsed.place(place_of(expr));
                self.types.learn(operand.slot(), wanted, place);
                wanted
            }
            (None, None) => return Ok(Typed::Open(operand)),
        };
        Ok(match kind {
            Kind::Number => Typed::Number(Number::Measured(operand)),
            Kind::Text => Typed::Text(Text::Measured(operand)),
            Kind::Flag => Typed::Flag(Flag::Measured(operand)),
        })
    }

    /// Returns the type of an expression as far as it can be told without its place. Never fails: what is
    /// wrong is found when the expression is compiled.
    fn hint(&self, expr: &IdedExpr) -> Option<Kind> {
        match &expr.expr {
            Expr::Literal(literal) => match literal {
                LiteralValue::Boolean(_) => Some(Kind::Flag),
                LiteralValue::String(_) => Some(Kind::Text),
                LiteralValue::Int(_) | LiteralValue::UInt(_) | LiteralValue::Double(_) => Some(Kind::Number),
                LiteralValue::Bytes(_) | LiteralValue::Null => None,
            },
            Expr::Call(call) if call.func_name == operators::CONDITIONAL => {
                call.args.iter().skip(1).find_map(|branch| self.hint(branch))
            }
            Expr::Call(call) if call.func_name != operators::INDEX => match call.func_name.as_str() {
                operators::ADD
                | operators::SUBSTRACT
                | operators::MULTIPLY
                | operators::DIVIDE
                | operators::MODULO
                | operators::NEGATE
                | "abs"
                | "min"
                | "max"
                | "size" => Some(Kind::Number),
                _ => Some(Kind::Flag),
            },
            Expr::Ident(_) | Expr::Select(_) | Expr::Call(_) => match self.name(expr).ok()? {
                Name::Fact(_) => Some(Kind::Text),
                Name::Measurement { name, .. } => {
                    self.types.known(self.names.slot(&name)?).map(|(kind, _)| *kind)
                }
            },
            _ => None,
        }
    }

    fn call(
        &mut self,
        expr: &IdedExpr,
        call: &CallExpr,
        wanted: Option<Kind>,
        depth: usize,
    ) -> Checked<Typed> {
        let next = depth + 1;
        match (call.func_name.as_str(), call.target.as_deref(), call.args.as_slice()) {
            (operators::LOGICAL_AND, None, [left, right]) => {
                let (left, right) = (self.flag(left, next)?, self.flag(right, next)?);
                Ok(Typed::Flag(all(left, right)))
            }
            (operators::LOGICAL_OR, None, [left, right]) => {
                let (left, right) = (self.flag(left, next)?, self.flag(right, next)?);
                Ok(Typed::Flag(any(left, right)))
            }
            (operators::LOGICAL_NOT, None, [flag]) => {
                Ok(Typed::Flag(Flag::Not(Box::new(self.flag(flag, next)?))))
            }
            (operators::CONDITIONAL, None, [condition, yes, no]) => {
                let condition = self.flag(condition, next)?;
                let wanted = wanted.or_else(|| self.hint(yes)).or_else(|| self.hint(no));
                self.conditional(condition, yes, no, wanted, next)
            }
            (operators::NEGATE, None, [number]) => Ok(match self.numeric(number, next)? {
                Typed::Integer(Integer::Constant(i)) if i != i64::MIN => {
                    Typed::Integer(Integer::Constant(-i))
                }
                Typed::Integer(i) => Typed::Integer(Integer::Negative(Box::new(i))),
                other => match number_of(other) {
                    Number::Constant(d) => Typed::Number(Number::Constant(-d)),
                    number => Typed::Number(Number::Negative(Box::new(number))),
                },
            }),
            (operators::IN, None, [element, list]) => self.membership(element, list, next),
            ("has", None, [name]) => self.presence(name),
            ("size", None, [text]) | ("size", Some(text), []) => {
                Ok(Typed::Integer(Integer::Size(Box::new(self.text(text, next)?))))
            }
            ("abs", None, [number]) => Ok(match self.numeric(number, next)? {
                Typed::Integer(i) => Typed::Integer(Integer::Absolute(Box::new(i))),
                other => Typed::Number(Number::Absolute(Box::new(number_of(other)))),
            }),
            ("min" | "max", None, numbers) if !numbers.is_empty() => self.extreme(call, numbers, next),
            ("startsWith" | "endsWith" | "contains", Some(text), [part]) => {
                let parts = Box::new((self.text(text, next)?, self.text(part, next)?));
                Ok(Typed::Flag(match call.func_name.as_str() {
                    "startsWith" => Flag::StartsWith(parts),
                    "endsWith" => Flag::EndsWith(parts),
                    _ => Flag::Contains(parts),
                }))
            }
            (name, None, [left, right]) if compare_of(name).is_some() => {
                let compare = compare_of(name).expect("the guard says so");
                self.comparison(expr, compare, left, right, next)
            }
            (name, None, [left, right]) if arithmetic_of(name).is_some() => {
                let op = arithmetic_of(name).expect("the guard says so");
                self.arithmetic(op, left, right, next)
            }
            (name, _, _) => Err(self.unknown_function(expr, name)),
        }
    }

    fn conditional(
        &mut self,
        condition: Flag,
        yes: &IdedExpr,
        no: &IdedExpr,
        wanted: Option<Kind>,
        depth: usize,
    ) -> Checked<Typed> {
        match wanted {
            Some(Kind::Flag) => {
                let (yes, no) = (self.flag(yes, depth)?, self.flag(no, depth)?);
                Ok(Typed::Flag(Flag::If(Box::new((condition, yes, no)))))
            }
            Some(Kind::Text) => {
                let (yes, no) = (self.text(yes, depth)?, self.text(no, depth)?);
                Ok(Typed::Text(Text::If(Box::new((condition, yes, no)))))
            }
            Some(Kind::Number) => Ok(match (self.numeric(yes, depth)?, self.numeric(no, depth)?) {
                (Typed::Integer(yes), Typed::Integer(no)) => {
                    Typed::Integer(Integer::If(Box::new((condition, yes, no))))
                }
                (yes, no) => Typed::Number(Number::If(Box::new((condition, number_of(yes), number_of(no))))),
            }),
            None => {
                Err(self
                    .error(yes, "nothing tells which type the branches have: compare them with a literal"))
            }
        }
    }

    fn comparison(
        &mut self,
        expr: &IdedExpr,
        compare: Compare,
        left: &IdedExpr,
        right: &IdedExpr,
        depth: usize,
    ) -> Checked<Typed> {
        let ordered = !matches!(compare, Compare::Equal | Compare::NotEqual);
        // Two names of which nothing tells the type are compared by the types that they turn out to have.
        let plain = [left, right].iter().all(|side| self.name(side).is_ok());
        let kind =
            self.hint(left).or_else(|| self.hint(right)).or((ordered && !plain).then_some(Kind::Number));
        let (l, r) = (self.typed(left, kind, depth)?, self.typed(right, kind, depth)?);
        if let (Some(l), Some(r)) = (l.kind(), r.kind())
            && l != r
        {
            let what = format!("does not fit: {} is compared with {}", l.noun(), r.noun());
            return Err(self.error(right, what));
        }
        Ok(Typed::Flag(match (l, r) {
            (Typed::Integer(l), Typed::Integer(r)) => Flag::Integers(compare, Box::new((l, r))),
            (Typed::Text(l), Typed::Text(r)) => Flag::Texts(compare, Box::new((l, r))),
            (Typed::Flag(_), Typed::Flag(_)) if ordered => {
                return Err(self.error(expr, "does not fit: truth values have no order"));
            }
            (Typed::Flag(l), Typed::Flag(r)) => Flag::Flags(compare, Box::new((l, r))),
            (Typed::Open(l), Typed::Open(r)) => {
                self.types.join(l.slot(), r.slot());
                Flag::Measurements(compare, l, r)
            }
            (l, r) => numbers(compare, number_of(l), number_of(r)),
        }))
    }

    fn arithmetic(
        &mut self,
        op: Arithmetic,
        left: &IdedExpr,
        right: &IdedExpr,
        depth: usize,
    ) -> Checked<Typed> {
        if op == Arithmetic::Add && [left, right].iter().any(|side| self.hint(side) == Some(Kind::Text)) {
            return Err(self.error(left, "joining texts is outside the subset of rules: `+` takes numbers"));
        }
        Ok(match (self.numeric(left, depth)?, self.numeric(right, depth)?) {
            (Typed::Integer(l), Typed::Integer(r)) => {
                Typed::Integer(Integer::Arithmetic(op, Box::new((l, r))))
            }
            (l, r) => {
                let sides = Box::new((number_of(l), number_of(r)));
                Typed::Number(Number::Arithmetic(op, sides))
            }
        })
    }

    fn extreme(&mut self, call: &CallExpr, numbers: &[IdedExpr], depth: usize) -> Checked<Typed> {
        let mut typed = Vec::with_capacity(numbers.len());
        for number in numbers {
            typed.push(self.numeric(number, depth)?);
        }
        let least = call.func_name == "min";
        if typed.iter().all(|t| matches!(t, Typed::Integer(_))) {
            let integers = typed.into_iter().filter_map(integer_of).collect();
            return Ok(Typed::Integer(if least {
                Integer::Least(integers)
            } else {
                Integer::Greatest(integers)
            }));
        }
        let numbers = typed.into_iter().map(number_of).collect();
        Ok(Typed::Number(if least { Number::Least(numbers) } else { Number::Greatest(numbers) }))
    }

    fn membership(&mut self, element: &IdedExpr, list: &IdedExpr, depth: usize) -> Checked<Typed> {
        let Expr::List(elements) = &list.expr else {
            return Err(self.error(list, "the right side of `in` is a list: `mode in [\"auto\", \"eco\"]`"));
        };
        let elements = elements.elements.as_slice();
        let kind = self.hint(element).or_else(|| elements.iter().find_map(|e| self.hint(e)));
        let Some(kind) = kind else {
            return Err(self.error(element, "nothing tells which type this has: put a literal in the list"));
        };
        Ok(Typed::Flag(match kind {
            Kind::Number => {
                let needle = number_of(self.numeric(element, depth)?);
                let mut list = Vec::with_capacity(elements.len());
                for e in elements {
                    list.push(number_of(self.numeric(e, depth)?));
                }
                Flag::NumberIn(Box::new((needle, list)))
            }
            Kind::Text => {
                let needle = self.text(element, depth)?;
                let mut list = Vec::with_capacity(elements.len());
                for e in elements {
                    list.push(self.text(e, depth)?);
                }
                Flag::TextIn(Box::new((needle, list)))
            }
            Kind::Flag => {
                let needle = self.flag(element, depth)?;
                let mut list = Vec::with_capacity(elements.len());
                for e in elements {
                    list.push(self.flag(e, depth)?);
                }
                Flag::TruthIn(Box::new((needle, list)))
            }
        }))
    }

    fn presence(&mut self, expr: &IdedExpr) -> Checked<Typed> {
        let is_name = matches!(&expr.expr, Expr::Ident(_) | Expr::Select(_))
            || matches!(&expr.expr, Expr::Call(call) if call.func_name == operators::INDEX);
        if !is_name {
            return Err(self.error(expr, "`has` takes a name"));
        }
        Ok(Typed::Flag(match self.name(expr)? {
            Name::Fact(fact) => Flag::HasFact(fact),
            Name::Measurement { name, before } => Flag::Has(self.operand(&name, before)),
        }))
    }

    fn unknown_function(&self, expr: &IdedExpr, name: &str) -> ExpressionError {
        if FUNCTIONS.contains(&name) {
            let usage = match name {
                "startsWith" | "endsWith" | "contains" => format!("`text.{name}(part)`"),
                "min" | "max" => format!("`{name}(a, b, …)`"),
                _ => format!("`{name}(x)`"),
            };
            return self.error(expr, format!("`{name}` is called as {usage}"));
        }
        let name = cel::common::ast::operators::find_operator(name).map_or(name, |_| name);
        let hint = suggestion(name, FUNCTIONS);
        self.error(expr, format!("unknown function `{name}`{hint} (known: {})", FUNCTIONS.join(", ")))
    }
}

/// Returns the node whose place stands for an expression: the operator's place says little about a left
/// operand, so an error goes to where the expression begins.
fn place_of(expr: &IdedExpr) -> u64 {
    match &expr.expr {
        Expr::Select(select) => place_of(&select.operand),
        Expr::Call(call) if call.func_name == operators::INDEX => call.args.first().map_or(expr.id, place_of),
        _ => expr.id,
    }
}

fn facts() -> String {
    DEVICE_FACTS.iter().map(|(name, _)| format!("device.{name}")).collect::<Vec<_>>().join(", ")
}

fn number_of(typed: Typed) -> Number {
    match typed {
        Typed::Number(number) => number,
        Typed::Integer(Integer::Constant(i)) => Number::Constant(i as f64),
        Typed::Integer(integer) => Number::Integer(Box::new(integer)),
        Typed::Open(operand) => Number::Measured(operand),
        Typed::Text(_) | Typed::Flag(_) => unreachable!("callers pass only what `numeric` returned"),
    }
}

fn integer_of(typed: Typed) -> Option<Integer> {
    match typed {
        Typed::Integer(integer) => Some(integer),
        _ => None,
    }
}

fn numbers(compare: Compare, left: Number, right: Number) -> Flag {
    match (left, right) {
        (Number::Measured(Operand::Now(slot)), Number::Constant(limit)) => {
            Flag::Threshold(slot, compare, limit)
        }
        (Number::Constant(limit), Number::Measured(Operand::Now(slot))) => {
            Flag::Threshold(slot, compare.mirrored(), limit)
        }
        sides => Flag::Numbers(compare, Box::new(sides)),
    }
}

fn all(left: Flag, right: Flag) -> Flag {
    let mut flags = Vec::new();
    for side in [left, right] {
        match side {
            Flag::All(inner) => flags.extend(inner),
            flag => flags.push(flag),
        }
    }
    Flag::All(flags)
}

fn any(left: Flag, right: Flag) -> Flag {
    let mut flags = Vec::new();
    for side in [left, right] {
        match side {
            Flag::Any(inner) => flags.extend(inner),
            flag => flags.push(flag),
        }
    }
    Flag::Any(flags)
}

fn compare_of(name: &str) -> Option<Compare> {
    Some(match name {
        operators::EQUALS => Compare::Equal,
        operators::NOT_EQUALS => Compare::NotEqual,
        operators::LESS => Compare::Less,
        operators::LESS_EQUALS => Compare::LessOrEqual,
        operators::GREATER => Compare::Greater,
        operators::GREATER_EQUALS => Compare::GreaterOrEqual,
        _ => return None,
    })
}

fn arithmetic_of(name: &str) -> Option<Arithmetic> {
    Some(match name {
        operators::ADD => Arithmetic::Add,
        operators::SUBSTRACT => Arithmetic::Subtract,
        operators::MULTIPLY => Arithmetic::Multiply,
        operators::DIVIDE => Arithmetic::Divide,
        operators::MODULO => Arithmetic::Remainder,
        _ => return None,
    })
}
