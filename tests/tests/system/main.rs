//! The platform as its users meet it: whole, with real services and clients that we did not write. One program, so
//! that what mostly waits runs side by side.

mod dead_letters;
mod end_to_end;
mod memory;
mod notify;
mod operators;
