//! The `litemesh` command.

fn main() {}
