//! Reads what nats-server writes to its log. Invariant: a line that is not understood is relayed whole.

use tracing::{debug, error, info, trace, warn};

/// How grave a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
    Fatal,
}

/// A line without its process id and time.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LogLine<'a> {
    pub(crate) level: Level,
    pub(crate) text: &'a str,
}

const TAGS: [(&str, Level); 6] = [
    ("[INF]", Level::Info),
    ("[WRN]", Level::Warn),
    ("[ERR]", Level::Error),
    ("[FTL]", Level::Fatal),
    ("[DBG]", Level::Debug),
    ("[TRC]", Level::Trace),
];

impl<'a> LogLine<'a> {
    /// `[pid] date time [LVL] text`. What has no level (a configuration error, a Go panic) comes from a server that
    /// is about to die: it counts as an error.
    pub(crate) fn parse(line: &'a str) -> Self {
        TAGS.iter()
            .filter_map(|(tag, level)| Some((line.find(tag)?, tag.len(), *level)))
            .min_by_key(|(at, ..)| *at)
            .map_or(Self { level: Level::Error, text: line.trim_end() }, |(at, len, level)| Self {
                level,
                text: line[at + len..].trim(),
            })
    }

    /// Into the program's own log; a hushed one no louder than at debug level.
    pub(crate) fn relay(&self, server: &str, hushed: bool) {
        let text = self.text;
        // The banner is drawn with empty lines.
        if text.is_empty() {
            return;
        }
        match self.level {
            Level::Info | Level::Warn | Level::Error | Level::Fatal if hushed => {
                debug!(target: "nats", server, "{text}");
            }
            Level::Trace => trace!(target: "nats", server, "{text}"),
            Level::Debug => debug!(target: "nats", server, "{text}"),
            Level::Info => info!(target: "nats", server, "{text}"),
            Level::Warn => warn!(target: "nats", server, "{text}"),
            Level::Error | Level::Fatal => error!(target: "nats", server, "{text}"),
        }
    }

    /// Whether Go's runtime says that it got no memory. Hundreds of lines about its threads follow.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        let is_fatal = self.text.starts_with("fatal error: ") || self.text.starts_with("runtime: ");
        is_fatal && (self.text.contains("out of memory") || self.text.contains("cannot allocate memory"))
    }

    /// The address of a listener that another process holds.
    pub(crate) fn port_taken(&self) -> Option<String> {
        if !self.text.contains("address already in use") {
            return None;
        }
        let (_, rest) = self.text.split_once("listen tcp ")?;
        Some(rest.split_once(": bind")?.0.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_texts() {
        let line = LogLine::parse("[71] 2026/01/02 03:04:05.678901 [WRN] slow [INF] consumer\n");
        assert_eq!(line, LogLine { level: Level::Warn, text: "slow [INF] consumer" });
        assert_eq!(LogLine::parse("panic: oh").level, Level::Error);
        let empty = LogLine { level: Level::Info, text: "" };
        assert_eq!(LogLine::parse("[71] 2026/01/02 03:04:05.678901 [INF]"), empty);
    }

    #[test]
    fn the_port_that_is_taken() {
        let cases = [
            "[1] d t [FTL] Error listening on port: 127.0.0.1:4222, \"listen tcp 127.0.0.1:4222: bind: address already in use\"",
            "[1] d t [FTL] Error listening on router port: 0 - listen tcp 127.0.0.1:4222: bind: address already in use",
        ];
        for case in cases {
            assert_eq!(LogLine::parse(case).port_taken().as_deref(), Some("127.0.0.1:4222"));
        }
        assert_eq!(LogLine::parse("[1] d t [FTL] listen tcp 1.2.3.4:1: bind: no").port_taken(), None);
    }
}
