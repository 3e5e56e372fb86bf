//! Programs that know nothing of litemesh, unmodified, on two nodes: the sqlite3 shell, Python, and Isso, a comment
//! server for web sites. What is not installed here is skipped, with the reason printed.

#[path = "../support/mod.rs"]
mod support;

mod django;
mod hub;
mod isso;
mod nats;
mod shell;
mod writer;
