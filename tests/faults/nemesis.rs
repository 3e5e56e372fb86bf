//! Breaks things as the plan says. Invariant: a fault that cannot be done at its moment (the process is not there, say)
//! is not done and not counted.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::network::{kill_hard, signal};
use crate::node::{App, Until};
use crate::plan::{Fault, Kind, Round, Victim};
use crate::world::World;

/// Runs the faults of a round, with everything else going on.
pub fn run(world: &mut World, round: &Round) {
    for i in 0..world.nodes.len() {
        // Of a file whose disk is small there may be no copy this time; the earlier ones are there.
        if let Err(e) = world.nodes[i].copy_online() {
            world.journal.get().violation(format!("no copy of the file of {i} can be made: {e}"));
        }
    }
    let started = Instant::now();
    let mut faults = round.faults.iter().peekable();
    while started.elapsed() < Duration::from_millis(round.lasts_ms) && !world.failed() {
        world.tick();
        world.tick_applications();
        if let Some(fault) = faults.next_if(|f| started.elapsed() >= Duration::from_millis(f.at_ms)) {
            world.note(&format!("fault {fault}"));
            let done = inject(world, fault);
            let outcome = if done { fault.kind.name() } else { format!("not done: {}", fault.kind.name()) };
            world.note(&outcome);
            if done {
                world.count(&outcome);
            }
        } else {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Does it; returns whether it could be done.
fn inject(world: &mut World, fault: &Fault) -> bool {
    let until = Until(Instant::now() + Duration::from_millis(fault.lasts_ms));
    let i = fault.node;
    match &fault.kind {
        Kind::Kill(victim) => kill(world, i, *victim, until),
        Kind::KillAll => {
            let killed = [Victim::Litemesh, Victim::Writer, Victim::Reader].map(|v| kill(world, i, v, until));
            killed.contains(&true)
        }
        Kind::Pause(victim) => pause(world, i, *victim, until),
        Kind::Restart => restart(world, i, until),
        Kind::Clock(offset_ms) => {
            if !restart(world, i, until) {
                return false;
            }
            world.nodes[i].clock_offset_ms = *offset_ms;
            // The applications see the same clock.
            kill(world, i, Victim::Writer, until);
            true
        }
        Kind::Swap => {
            let node = &mut world.nodes[i];
            node.binary = (node.binary + 1) % node.binaries.len();
            restart(world, i, until)
        }
        Kind::CutBoth(other) => {
            world.nodes[*other].network_faults.push((Kind::CutFrom(i), until));
            world.nodes[i].network_faults.push((Kind::CutFrom(*other), until));
            true
        }
        Kind::CutFrom(_) | Kind::LinkDown | Kind::Loss(_) | Kind::Delay(_) => {
            world.nodes[i].network_faults.push((fault.kind.clone(), until));
            true
        }
        Kind::FullDisk => fill(world, i, until),
        Kind::PutBack { killed } => put_back(world, i, *killed, until, fault.lasts_ms),
        Kind::Ddl => ddl(world, i, fault),
    }
}

fn pid(world: &World, i: usize, victim: Victim) -> Option<i32> {
    let node = &world.nodes[i];
    match victim {
        Victim::Litemesh => node.litemesh.as_ref().map(|c| c.id() as i32),
        Victim::Server => node.server_pid(),
        Victim::Writer => node.writer.as_ref().map(App::pid),
        Victim::Reader => node.reader.as_ref().map(App::pid),
    }
}

fn kill(world: &mut World, i: usize, victim: Victim, until: Until) -> bool {
    let Some(pid) = pid(world, i, victim) else { return false };
    let node = &mut world.nodes[i];
    match victim {
        Victim::Litemesh => {
            node.kill();
            node.down_until = Some(until);
        }
        Victim::Server => kill_hard(pid),
        Victim::Writer => {
            node.writer.take().into_iter().for_each(App::kill);
            node.writer_down_until = Some(until);
        }
        Victim::Reader => {
            node.reader.take().into_iter().for_each(App::kill);
            node.reader_down_until = Some(until);
        }
    }
    true
}

fn pause(world: &mut World, i: usize, victim: Victim, until: Until) -> bool {
    let Some(pid) = pid(world, i, victim) else { return false };
    signal(pid, Signal::STOP);
    world.nodes[i].paused.push((pid, until));
    true
}

/// Lets go on whatever was stopped: SIGTERM is for a process that runs.
fn unpause(world: &mut World, i: usize) {
    for (pid, _) in std::mem::take(&mut world.nodes[i].paused) {
        signal(pid, Signal::CONT);
    }
}

fn restart(world: &mut World, i: usize, until: Until) -> bool {
    unpause(world, i);
    let runs = world.nodes[i].is_ready();
    if runs {
        world.stop(i);
        world.nodes[i].down_until = Some(until);
    }
    runs
}

fn fill(world: &mut World, i: usize, until: Until) -> bool {
    // Those with a file system of their own are the last ones.
    let count = world.nodes.len();
    let i = if world.nodes[i].disk.is_some() { i } else { count - 1 - i % 2 };
    let node = &mut world.nodes[i];
    if node.full_until.is_some() || node.behind {
        return false;
    }
    node.fill_disk();
    node.full_until = Some(until);
    node.was_full.push((Instant::now(), None));
    true
}

/// Puts an older copy in the place of a node's file, once another node has all that was acknowledged here.
fn put_back(world: &mut World, i: usize, killed: bool, until: Until, choice: u64) -> bool {
    unpause(world, i);
    if world.changing.as_ref().is_some_and(|(of, _)| *of == i) {
        return false;
    }
    let node = &mut world.nodes[i];
    if node.behind || node.full_until.is_some() || node.copies.is_empty() || !node.is_ready() {
        return false;
    }
    for app in [node.writer.take(), node.reader.take()].into_iter().flatten() {
        app.kill();
    }
    let later = Some(Until(Instant::now() + Duration::from_secs(60)));
    (node.writer_down_until, node.reader_down_until) = (later, later);
    let others_have_it = others_have_all(world, i);
    let node = &mut world.nodes[i];
    (node.writer_down_until, node.reader_down_until) = (None, None);
    if !others_have_it || node.litemesh.is_none() || node.full_until.is_some() {
        return false;
    }
    if killed {
        node.kill();
    } else {
        world.stop(i);
    }
    let node = &mut world.nodes[i];
    let copy = node.copies[choice as usize % node.copies.len()].clone();
    let moved = node.copy_stopped().and_then(|()| if copy.exists() { node.put_back(&copy) } else { Ok(()) });
    moved.expect("files can be copied");
    node.down_until = Some(until);
    node.behind = true;
    world.journal.get().forget_seen(&world.nodes[i].name);
    world.note(&format!("put back {}", copy.display()));
    true
}

/// Whether at least one other node has all that this one has. Everything else goes on meanwhile.
fn others_have_all(world: &mut World, i: usize) -> bool {
    let Ok(mut question) = world.nodes[i].begin_to_ask(&["sync", "--timeout", "6s"], 8) else { return false };
    loop {
        if let Some(answer) = question.answer() {
            return answer.is_ok_and(|said| !said.starts_with("no other node"));
        }
        world.tick();
        world.tick_applications();
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The schema is changed on one node at a time. It may have to wait for the file's lock, and nothing waits for it.
fn ddl(world: &mut World, i: usize, fault: &Fault) -> bool {
    let node = &world.nodes[i];
    if node.behind || world.changing.is_some() {
        return false;
    }
    let done = world.injected.get(&fault.kind.name()).copied().unwrap_or_default();
    world.changing = Some((i, App::start("ddl", node, done, &world.journal)));
    true
}
