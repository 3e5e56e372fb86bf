//! The hot parts by the clock: `cargo bench --bench hot`, with a part of a name as argument only those. The same work is
//! counted in instructions by `tests/guard`, which is what tests compare.

#[path = "../guard/work.rs"]
mod work;

use criterion::{BatchSize, Criterion, Throughput};

fn hot(criterion: &mut Criterion) {
    for work in work::ALL {
        let mut group = criterion.benchmark_group(work.name);
        group.throughput(Throughput::Elements(work.rows as u64)).sample_size(20);
        // What was prepared is used up by one run.
        group.bench_function("rows", |bencher| {
            bencher.iter_batched_ref(work.prepare, |ready| ready(), BatchSize::PerIteration);
        });
        group.finish();
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    hot(&mut criterion);
    criterion.final_summary();
}
