"""The sharded teacher and student as actors on nodes of their own: one step equals that of one process, and the
teacher's rows go from worker to worker."""

import ray
import torch

from fastkd.payload import compress
from fastkd.placement import Placement
from fastkd.ray_pools import Options, RayPool
from fastkd.student import Student
from fastkd.teacher import Teacher

TP2 = {"tensor_parallel_size": 2, "sequence_parallel": True}
CPU = torch.device("cpu")
EXACT = 1e-5


class Traffic:
    """Bytes that this process gives to Ray or takes from it: arguments, results, and objects that it puts or gets."""

    def __init__(self, monkeypatch):
        self.sent = self.received = 0
        context = ray._private.worker.global_worker.get_serialization_context()
        serialize, deserialize = context.serialize, context.deserialize_objects

        def send(value):
            made = serialize(value)
            self.sent += made.total_bytes
            return made

        def receive(objects, *args, **kwargs):
            for data, metadata, *_ in objects:
                self.received += sum(len(part) for part in (data, metadata) if part is not None)
            return deserialize(objects, *args, **kwargs)

        monkeypatch.setattr(context, "serialize", send)
        monkeypatch.setattr(context, "deserialize_objects", receive)

    @property
    def total(self):
        return self.sent + self.received


def test_one_step(cluster, isolated, tmp_path, tiny_qwen3, monkeypatch):
    import ray_workers
    from student_worker import error, rollouts, weights

    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_qwen3(tied=name == "student", seed=seed, num_hidden_layers=1).save_pretrained(tmp_path / name)
    sequences, alone = rollouts(), isolated(tmp_path)
    student = Student(alone, CPU, 97)
    rows = Teacher(alone, CPU, 97).score(sequences)
    wanted = student.train(sequences, rows) | student.divergences(sequences, rows)

    recipe = isolated(tmp_path, **TP2)
    with (
        Placement(recipe, cpu_slots=2) as placement,
        RayPool(placement.slots("teacher"), Options(threads=1), ray_workers.teacher, recipe, 97) as teacher,
        RayPool(placement.slots("training"), Options(threads=1), ray_workers.student, recipe, 97) as training,
    ):
        assert not {n.id for n in teacher.slots.nodes} & {n.id for n in training.slots.nodes}
        kept = teacher.keep(Teacher.score, sequences)
        assert kept.lengths == [len(one.response) for one in sequences]
        assert kept.nbytes == sum(compress(one).nbytes for one in rows if one is not None)
        owners = {one.reference.owner_address() for one in kept.items if one is not None}
        assert len(owners) == 1  # the first rank of the two: the other's rows are the same
        for (metrics, after), rank in zip(training.run_all(ray_workers.train, sequences, kept), range(2), strict=True):
            assert metrics.keys() == wanted.keys()
            errors = {name: abs(metrics[name] - value) / max(abs(value), 1e-12) for name, value in wanted.items()}
            before = weights(student)
            errors |= {name: error(value, before[name]) for name, value in after.items()}
            wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= EXACT}
            assert not wrong, f"rank {rank}: relative errors {wrong}"
        print(f"largest relative error {max(errors.values()):.1e}")

        # The payload of long responses, and what of it the driver sees.
        traffic = Traffic(monkeypatch)
        check = ray.get(ray.put(bytes(1000)))
        assert len(check) == 1000 and traffic.sent >= 1000 and traffic.received >= 1000  # it counts
        traffic.sent = traffic.received = 0
        many = teacher.keep(ray_workers.wide_rows, 8, 1000)
        digest = training.run_all(ray_workers.digest, many)
        assert digest == [sum(range(8)) * 1000] * 2  # and the rows arrived
        assert many.lengths == [1000] * 8
        assert many.nbytes > 8 * 1000 * 512 * 4
        print(f"{traffic.total} bytes through the driver for {many.nbytes} bytes of rows")
        assert traffic.total < 0.01 * many.nbytes
