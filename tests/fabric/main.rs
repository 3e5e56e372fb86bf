//! The fabric over real nats-servers on loopback.

mod copies;
mod facts;
mod joining;
mod leaving;
mod logs;
mod meeting;
mod messages;
mod raw;
mod rotation;
mod starting;
mod support;
mod surviving;
