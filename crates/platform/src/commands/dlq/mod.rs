//! `throughline dlq`: dead letters grouped by cause, shown, replayed and dropped.
//!
//! Replays and drops are requests on a topic that the role `reprocess_dead_letters` carries out, so they
//! survive the terminal that asked for them.

mod causes;
mod list;
mod replay;
mod requests;
mod selector;

use crate::config::Flags;
use crate::context::Context;
use crate::failure::{CliError, Exit};
use selector::Selector;
use throughline_model::dead_letter::Action;

/// Arguments of `dlq`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Count dead letters by topic, stage, code, schema and rule version, open ones and those that were dealt with
    List {
        #[command(flatten)]
        selector: Selector,
    },
    /// Count what exhausted its replays and was parked, by cause as `list` does
    Parking {
        #[command(flatten)]
        selector: Selector,
    },
    /// Show dead letters with cause, trace, headers and bytes
    Show {
        #[command(flatten)]
        selector: Selector,
        /// How many at most
        #[arg(long, default_value_t = 10)]
        limit: u64,
    },
    /// Send dead letters to the replay topic of the group that refused them; shows first what would come out
    Replay(replay::Args),
    /// Count dead letters as dealt with; they stay in their topic
    Drop {
        #[command(flatten)]
        selector: Selector,
        /// Why; it is kept with the request
        #[arg(long)]
        reason: String,
        #[command(flatten)]
        how: replay::How,
    },
    /// List replays and drops with how far they are
    Requests,
    /// End a replay where it is, or undo a drop
    Cancel {
        /// The request's id
        id: String,
    },
}

/// Runs the subcommand.
///
/// # Errors
/// Exit code 2 for a wrong selector, 1 when a request failed, 4 when Kafka is away.
pub fn run(flags: &Flags, args: &Args) -> Result<Exit, CliError> {
    let context = Context::new(flags.load()?)?;
    match &args.command {
        Command::List { selector } => list::list(flags, &context, selector),
        Command::Parking { selector } => list::parking(flags, &context, selector),
        Command::Show { selector, limit } => list::show(flags, &context, selector, *limit),
        Command::Replay(args) => replay::run(flags, &context, args),
        Command::Drop { selector, reason, how } => {
            let wish = replay::Wish {
                action: Action::Drop,
                justification: Some(reason.clone()),
                again: false,
                rate_per_second: None,
            };
            replay::carry_out(flags, &context, selector, &wish, how, 0)
        }
        Command::Requests => requests::list(flags, &context),
        Command::Cancel { id } => requests::cancel(flags, &context, id),
    }
}
