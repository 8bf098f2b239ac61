//! `throughline explain`: what an error code means and what helps.

use crate::config::Flags;
use crate::failure::{CliError, Exit};
use crate::output;
use throughline_runtime::codes::{CODES, Code};

/// Arguments of `explain`.
#[derive(clap::Args)]
pub struct Args {
    /// The code, for instance TL-KAFKA-012; without it all codes are listed
    code: Option<String>,
}

/// Prints one code or lists all.
///
/// # Errors
/// A usage error that names the nearest code.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let Some(wanted) = &args.code else {
        list(flags);
        return Ok(Exit::Done);
    };
    let wanted = wanted.to_uppercase();
    let Some(code) = CODES.iter().find(|code| code.id == wanted) else {
        let nearest = CODES.iter().min_by_key(|code| strsim::levenshtein(code.id, &wanted));
        let nearest = nearest.map_or("", |code| code.id);
        return Err(CliError::usage(format!("there is no code `{wanted}`; did you mean `{nearest}`?")));
    };
    if flags.json {
        output::json("explain", document(code));
    } else {
        output::line(&format!("{}: {}\n\n{}\n\n{}", code.id, code.title, code.explanation, code.remedy));
    }
    Ok(Exit::Done)
}

fn list(flags: &Flags) {
    if flags.json {
        let codes: Vec<serde_json::Value> = CODES.iter().map(document).collect();
        output::json("explain", serde_json::json!({ "codes": codes }));
        return;
    }
    let rows: Vec<Vec<String>> = CODES.iter().map(|c| vec![c.id.to_owned(), c.title.to_owned()]).collect();
    output::table(&["CODE", "WHAT"], &rows);
}

fn document(code: &Code) -> serde_json::Value {
    serde_json::json!({
        "code": code.id,
        "title": code.title,
        "explanation": code.explanation,
        "remedy": code.remedy,
    })
}
