//! Real nodes: the litemesh binary, real nats-servers, real SQLite files, applications with plain connections.

#[path = "../support/mod.rs"]
mod support;

mod catchup;
mod cdc;
mod crash;
mod external;
mod external_login;
mod full;
mod join;
mod life;
mod peers;
mod poison;
mod power;
mod rebuild;
mod rekey;
mod rolling;
mod shapes;
mod survive;
mod terminal;
mod whole;
