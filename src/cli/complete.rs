//! `completions` and `man`: what shells and readers of manuals need. Invariant: both are made from the same clap
//! definition that parses the command line, so that they cannot disagree with it.

use std::io::{self, Write};

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use super::args::Cli;

/// Writes the completion script of a shell.
pub fn completions(shell: Shell, out: &mut dyn Write) -> io::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "litemesh", &mut script);
    out.write_all(&script)
}

/// Writes the manual page: the command itself, then a section for each of its subcommands.
pub fn man(out: &mut dyn Write) -> io::Result<()> {
    let mut root = Cli::command();
    root.build();
    let page = Man::new(root.clone());
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    let mut waiting: Vec<clap::Command> = root.get_subcommands().cloned().collect();
    waiting.reverse();
    while let Some(command) = waiting.pop() {
        if command.get_name() == "help" {
            continue;
        }
        let inner: Vec<clap::Command> = command.get_subcommands().cloned().collect();
        if inner.is_empty() {
            render_command(command, out)?;
        }
        waiting.extend(inner.into_iter().rev());
    }
    page.render_extra_section(out)?;
    page.render_version_section(out)
}

/// One command's synopsis, description and options under a heading with its name.
fn render_command(command: clap::Command, out: &mut dyn Write) -> io::Result<()> {
    let called = command.get_bin_name().unwrap_or(command.get_name()).to_uppercase();
    let page = Man::new(command);
    let mut body = Vec::new();
    page.render_synopsis_section(&mut body)?;
    page.render_description_section(&mut body)?;
    page.render_options_section(&mut body)?;
    let body = String::from_utf8_lossy(&body);
    writeln!(out, ".SH \"{called}\"")?;
    for line in body.lines() {
        match line.strip_prefix(".SH ") {
            Some(heading) => writeln!(out, ".SS {heading}")?,
            None => writeln!(out, "{line}")?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_gets_a_script() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::PowerShell, Shell::Elvish] {
            let mut script = Vec::new();
            completions(shell, &mut script).unwrap();
            assert!(String::from_utf8(script).unwrap().contains("state-dir"), "{shell}");
        }
    }

    #[test]
    fn the_manual_has_every_command() {
        let mut page = Vec::new();
        man(&mut page).unwrap();
        let page = String::from_utf8(page).unwrap();
        for heading in ["LITEMESH UP", "LITEMESH CONFLICTS LIST", "LITEMESH CHECK"] {
            assert!(page.contains(&format!(".SH \"{heading}\"")), "{heading} in\n{page}");
        }
        assert_eq!(page.matches("\n.TH ").count() + usize::from(page.starts_with(".TH ")), 1);
    }
}
