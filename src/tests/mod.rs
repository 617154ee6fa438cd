//! Unit tests that look at more than one module; those of a single module stand at its end.

mod layout;
mod poison;
