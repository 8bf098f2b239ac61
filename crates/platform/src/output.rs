//! What commands print: data on stdout, notices on stderr.

use std::io::{IsTerminal, Write};

/// Version of the JSON that commands print; it rises when a field changes its meaning or goes away.
pub const JSON_VERSION: u32 = 1;

/// Prints a line of data. A closed pipe ends the process quietly, as for any filter.
pub fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Prints a JSON document with the schema's version in it.
pub fn json(kind: &str, mut document: serde_json::Value) {
    if let Some(object) = document.as_object_mut() {
        object.insert("schema".into(), format!("throughline.{kind}.v{JSON_VERSION}").into());
    }
    line(&document.to_string());
}

/// Prints a notice on stderr.
#[expect(clippy::print_stderr, reason = "notices of commands belong on stderr")]
pub fn notice(text: &str) {
    eprintln!("{text}");
}

/// Prints progress on stderr, where that is a terminal.
pub fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        notice(text);
    }
}

/// Prints an error on stderr.
pub fn error(text: &str) {
    let plain = std::env::var_os("NO_COLOR").is_some() || !std::io::stderr().is_terminal();
    notice(&if plain { format!("error: {text}") } else { format!("\u{1b}[31merror\u{1b}[0m: {text}") });
}

/// Prints rows in aligned columns under a header.
pub fn table(header: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = header.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let print = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
        }
        line(text.trim_end());
    };
    print(&mut header.iter().copied());
    for row in rows {
        print(&mut row.iter().map(String::as_str));
    }
}
