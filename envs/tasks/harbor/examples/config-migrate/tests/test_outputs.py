import hashlib
import json
import unittest


class Migration(unittest.TestCase):
    def test_json(self):
        with open("/app/server.json") as file:
            self.assertEqual(json.load(file), {
                "server": {"port": 8080, "host": "0.0.0.0", "tls": True}, "limits": {"clients": 200, "idle": 3600},
                "paths": {"logs_dir": "/var/log/server", "cache_dir": "/var/cache/server"}})

    def test_the_old_file_is_as_it_was(self):
        with open("/app/server.ini", "rb") as file:
            self.assertEqual(hashlib.sha256(file.read()).hexdigest(), "54086bc685755dc90c6e4842389a21dc7aba1a1cc31cd72f88279f7387a52367")


if __name__ == "__main__":
    unittest.main()
