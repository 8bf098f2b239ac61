//! The topic catalog: what `topics/` declares, checked, and everything that follows from it.

pub mod feed;
pub mod filter;

pub use feed::{Decoder, FeedSpec};
pub use filter::{Filter, InvalidFilter};
