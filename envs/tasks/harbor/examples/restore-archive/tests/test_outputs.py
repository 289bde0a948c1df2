import pathlib
import tarfile
import unittest


class Restored(unittest.TestCase):
    def test_files(self):
        found = {path.name: path.read_text() for path in pathlib.Path("/app/restored").iterdir() if not path.is_symlink()}
        self.assertEqual(found, {"plan.txt": "plan v1\n", "notes.txt": "notes v2\n", "code.txt": "code v2\n"})

    def test_the_vault_is_whole(self):
        for day in ("monday", "tuesday", "wednesday"):
            with tarfile.open(f"/app/vault/{day}.tar.gz") as archive:
                self.assertEqual(sorted(archive.getnames()), ["code.txt", "notes.txt", "plan.txt"])


if __name__ == "__main__":
    unittest.main()
