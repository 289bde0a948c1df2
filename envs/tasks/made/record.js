// Performs statements in the modules of a JavaScript package; record_javascript.py asks it.
//
//     node record.js PACKAGE 3> ANSWERS < QUESTIONS
//
// A question is a line of JSON. {"list": true} is answered by what each module exports; {"module",
// "statements", "watch"} by what the statements show, in which `m` is what the module exports, and
// with "watch" by the package's lines that they ran. Modules are those of CommonJS.

const fs = require("node:fs");
const inspector = require("node:inspector");
const path = require("node:path");
const readline = require("node:readline");
const url = require("node:url");
const util = require("node:util");
const vm = require("node:vm");

const STATEMENT_MS = 5000;
const SHOWN = { depth: 6, breakLength: Infinity, maxStringLength: 1000, maxArrayLength: 60, sorted: true };
const root = path.resolve(process.argv[2]);
const base = path.dirname(root);
const session = new inspector.Session();

// Returns the result of a command of V8's profiler; it is ready when `post` returns.
function profiler(command, parameters) {
  let result = null;
  session.post(`Profiler.${command}`, parameters, (error, found) => {
    result = found;
  });
  return result;
}

// Returns the paths of the package's modules, from the folder of the package.
function modulePaths(folder) {
  const found = [];
  for (const entry of fs.readdirSync(folder, { withFileTypes: true })) {
    const place = path.join(folder, entry.name);
    if (entry.isDirectory() && !["node_modules", "test", "tests", "bin"].includes(entry.name)) {
      found.push(...modulePaths(place));
    } else if (/\.c?js$/.test(entry.name) && !/\.min\.js$|\.test\.js$/.test(entry.name)) {
      found.push(path.relative(base, place));
    }
  }
  return found.sort();
}

function load(module) {
  return require(path.join(base, module));
}

function isClass(value) {
  const own = value.prototype ? Object.getOwnPropertyNames(value.prototype) : [];
  return /^class\b/.test(Function.prototype.toString.call(value)) || own.length > 1;
}

// Returns the ways to use what a module exports under a name: text, and how many arguments.
function usesOf(name, value) {
  if (typeof value !== "function") return [];
  if (!isClass(value)) return [{ form: `${name}({})`, counts: [value.length] }];
  const make = `new ${name}({})`;
  const found = [{ form: make, counts: [value.length], makes: name }];
  for (const [key, told] of Object.entries(Object.getOwnPropertyDescriptors(value.prototype))) {
    if (key === "constructor" || !/^[A-Za-z]\w*$/.test(key)) continue;
    if (told.get) found.push({ form: `${make}.${key}`, counts: [value.length] });
    if (typeof told.value === "function") {
      found.push({ form: `${make}.${key}({})`, counts: [value.length, told.value.length] });
    }
  }
  return found;
}

function list() {
  const found = [];
  for (const module of modulePaths(root)) {
    let exported;
    try {
      exported = quietly(() => load(module)).result;
    } catch {
      continue;
    }
    const uses = usesOf("m", exported);
    const holder = exported && /object|function/.test(typeof exported) ? exported : {};
    for (const key of Object.keys(holder).sort()) {
      if (/^[A-Za-z]\w*$/.test(key)) {
        try {
          uses.push(...usesOf(`m.${key}`, holder[key]));
        } catch {
          // a getter that fails
        }
      }
    }
    found.push(...uses.map((use) => ({ module, ...use })));
  }
  return found;
}

// Calls a function and returns its result with what it printed.
function quietly(work) {
  let printed = "";
  const streams = [process.stdout, process.stderr];
  const writes = streams.map((stream) => stream.write);
  streams[0].write = (text) => {
    printed += text;
    return true;
  };
  streams[1].write = () => true;
  try {
    return { result: work(), printed };
  } finally {
    streams.forEach((stream, number) => {
      stream.write = writes[number];
    });
  }
}

async function settle(value) {
  if (!value || typeof value.then !== "function") return value;
  let timer;
  const late = new Promise((_, fail) => {
    timer = setTimeout(() => fail(new RangeError("not settled")), 1000);
  });
  return Promise.race([value, late]).finally(() => clearTimeout(timer));
}

// Returns [kind of end, text] of each statement, or null where they do not end in time.
async function perform(module, statements) {
  const outcome = [];
  for (const statement of statements) {
    try {
      globalThis.m = load(module);
      const run = () => vm.runInThisContext(statement, { timeout: STATEMENT_MS });
      const { result, printed } = quietly(run);
      outcome.push([1, printed + util.inspect(await settle(result), SHOWN)]);
    } catch (error) {
      if (error && error.code === "ERR_SCRIPT_EXECUTION_TIMEOUT") return null;
      outcome.push([0, String((error && error.name) || typeof error)]);
    }
  }
  return outcome;
}

// Returns the lines of the package's files that ran since the last call, by path.
function linesRun() {
  const lines = {};
  for (const script of profiler("takePreciseCoverage").result) {
    if (!script.url.startsWith("file:")) continue;
    const file = url.fileURLToPath(script.url);
    if (!file.startsWith(root + path.sep)) continue;
    const called = script.functions.filter(({ ranges }) => ranges[0].count > 0);
    if (!called.length) continue;
    const text = fs.readFileSync(file, "utf8");
    const ran = new Uint8Array(text.length);
    for (const { ranges } of called) {
      for (const { startOffset, endOffset, count } of ranges) {
        ran.fill(count > 0 ? 1 : 0, startOffset, endOffset);
      }
    }
    const found = [];
    let line = 1;
    let isRun = false;
    for (let place = 0; place < text.length; place++) {
      if (text[place] === "\n") {
        if (isRun) found.push(line);
        line += 1;
        isRun = false;
      } else if (ran[place] && /\w/.test(text[place])) isRun = true;
    }
    if (isRun) found.push(line);
    if (found.length) lines[path.relative(base, file)] = found;
  }
  return lines;
}

async function main() {
  session.connect();
  profiler("enable");
  profiler("startPreciseCoverage", { callCount: true, detailed: true });
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line);
    let answer = {};
    if (asked.list) {
      answer = { targets: list() };
    } else {
      if (asked.watch) {
        try {
          quietly(() => load(asked.module)); // what runs at loading is no test's own
        } catch {
          // the statements will show it
        }
        linesRun();
      }
      answer.outcome = await perform(asked.module, asked.statements);
      if (asked.watch) answer.lines = linesRun();
    }
    fs.writeSync(3, JSON.stringify(answer) + "\n");
  }
  process.exit(0);
}

process.on("uncaughtException", () => {});
process.on("unhandledRejection", () => {});
main();
