import pathlib
import subprocess
import tempfile
import unittest

NAMES = ["backup-2023-12-31.tar", "backup-2024-01-02.tar", "backup-2024-01-10.tar", "backup-2024-02-01.tar", "backup-x.tar",
         "backup-2024-01-02.tar.gz", "notes.txt"]


def rotate(folder, count):
    run = subprocess.run(["/bin/bash", "/app/rotate.sh", str(folder), count], capture_output=True, text=True, timeout=20, cwd="/")
    return run.returncode, run.stdout.split("\n")[:-1], sorted(path.name
                                                               for path in pathlib.Path(folder).iterdir()) if pathlib.Path(folder).is_dir() else []


class Rotate(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp()) / "my backups"
        self.folder.mkdir()
        for name in reversed(NAMES):
            (self.folder / name).touch()

    def test_keeps_the_newest(self):
        self.assertEqual(rotate(self.folder, "2"), (0, NAMES[:2], sorted(NAMES[2:])))

    def test_keeps_all(self):
        self.assertEqual(rotate(self.folder, "9"), (0, [], sorted(NAMES)))

    def test_wrong_use(self):
        for count in ("0", "-1", "x", ""):
            self.assertEqual(rotate(self.folder, count), (2, [], sorted(NAMES)))
        self.assertEqual(rotate(self.folder / "none", "2")[:2], (2, []))


if __name__ == "__main__":
    unittest.main()
