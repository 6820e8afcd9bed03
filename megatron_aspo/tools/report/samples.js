"use strict";
{
  const runs = JSON.parse(document.getElementById("samples-data").textContent);
  const byId = (id) => document.getElementById(id);
  const HINT = "Point at a token, or walk over them with Tab and the arrow keys.";
  // |log w| below which a token has no colour, and from which it has the strongest: the usual dual clip.
  const NEAR = 0.01, FULL = Math.log(3);
  const OBSERVATION = -1; // in the place of a version of the weights

  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const number = (value, digits = 3) => {
    if (value === null) return "not finite";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 0.001 || size >= 10000) ? value.toExponential(2) : value.toFixed(digits);
    return text.replace("-", "−");
  };
  const numbered = (count) => `${count} token${count === 1 ? "" : "s"}`;
  const signed = (value) => (value > 0 ? "+" : "") + number(value);

  // Invisible characters are shown as a sign; a line break also breaks the line.
  const visible = (piece) => {
    const parts = document.createDocumentFragment();
    if (piece === "") parts.append(make("span", "mark", "·"));
    for (const character of piece) {
      const code = character.codePointAt(0);
      if (character === "\n") parts.append(make("span", "mark", "↵"), "\n");
      else if (character === "\t") parts.append(make("span", "mark", "⇥"), "\t");
      else if (code < 32) parts.append(make("span", "mark", "^" + String.fromCodePoint(64 + code)));
      else parts.append(character);
    }
    return parts;
  };

  const makeToken = (run, response, i, hard, soft) => {
    const token = make("span", "token");
    const weight = response.weight[i];
    token.append(visible(response.tokens[i]));
    token.tabIndex = -1;
    token.dataset.i = i;
    if (versionOf(response, i) === OBSERVATION) {
      token.classList.add("observed");
      return token;
    }
    const clipped = hard.has(i);
    if (clipped) token.classList.add("hard");
    if (soft.has(i)) token.classList.add("soft");
    if (run.objective === "aspo" && response.advantage > 0 && !clipped) token.classList.add("flipped");
    const far = weight > 0 && Math.abs(Math.log(weight)) > NEAR;
    if (far && response.advantage !== 0) {
      token.classList.add(weight > 1 ? "pushed" : "held");
      // The root makes weights near 1 visible, where most are.
      const share = Math.sqrt(Math.min(1, Math.abs(Math.log(weight)) / FULL));
      token.style.setProperty("--share", `${Math.round(70 * share)}%`);
    }
    return token;
  };

  // Tokens of the policy by the version of its weights.
  const tokensBy = (response) => {
    const sums = new Map();
    for (const [version, count] of response.versions)
      if (version !== OBSERVATION) sums.set(version, (sums.get(version) ?? 0) + count);
    return sums;
  };

  const versionOf = (response, i) => response.versions.find(([, count]) => (i -= count) < 0)?.[0];

  const describe = (run, response, i) => {
    const place = `${JSON.stringify(response.tokens[i])}, token ${i + 1} of ${response.length}`;
    if (versionOf(response, i) === OBSERVATION) return `${place}  ·  written by the environment, without loss`;
    const notes = [];
    if (response.hard.includes(i)) notes.push("hard-clipped");
    else if (run.objective === "aspo" && response.advantage > 0) notes.push("flipped");
    if (response.soft.includes(i)) notes.push("soft-clipped");
    if (tokensBy(response).size > 1) notes.push(`by the weights of update ${versionOf(response, i)}`);
    return [
      place,
      `w ${number(response.weight[i])}`,
      `r ${number(response.ratio[i])}`,
      `A ${signed(response.advantage)}`,
      `log-prob ${number(response.logprob[i])}`,
      `entropy ${number(response.entropy[i])}`,
      ...notes,
    ].join("  ·  ");
  };

  const makeResponse = (run, response) => {
    const box = make("article");
    const about = make("div", "about");
    const sign = Math.sign(response.advantage);
    about.append(make("span", sign > 0 ? "up" : sign < 0 ? "down" : "", `${["▼", "=", "▲"][sign + 1]} A ${signed(response.advantage)}`));
    const score = response.score === response.reward ? "" : `, score ${number(response.score)}`;
    about.append(make("span", "", `reward ${number(response.reward)}${score}`));
    const ended = { stop: "ended by itself", length: "cut off at the limit" };
    about.append(make("span", "", `${numbered(response.length)}, ${ended[response.finish] ?? response.finish}`));
    const observed = response.versions.filter(([version]) => version === OBSERVATION);
    const seen = observed.reduce((sum, [, count]) => sum + count, 0);
    if (seen) about.append(make("span", "", `${observed.length + 1} turns, ${numbered(seen)} by the environment`));
    const sums = [...tokensBy(response)].map(([version, count]) => `${count} by the weights of update ${version}`);
    if (sums.length > 1) about.append(make("span", "", sums.join(", ")));
    const text = make("div", "text");
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", "response");
    const hard = new Set(response.hard), soft = new Set(response.soft);
    const tokens = response.tokens.map((_, i) => makeToken(run, response, i, hard, soft));
    text.append(...tokens);
    if (response.tokens.length < response.length) text.append(make("span", "mark", ` … ${response.length - response.tokens.length} more`));
    if (tokens.length) tokens[0].tabIndex = 0; // one stop for Tab; the arrows go on from there
    const count = (name) => tokens.filter((token) => token.classList.contains(name)).length;
    const counts = [["pushed", "pushed"], ["held", "held back"], ["hard", "hard-clipped"], ["soft", "soft-clipped"]];
    about.append(make("span", "counts", counts.filter(([name]) => count(name)).map(([name, word]) => `${count(name)} ${word}`).join(", ")));
    const show = (event) => {
      const token = event.target.closest(".token");
      if (token) byId("detail").textContent = describe(run, response, Number(token.dataset.i));
    };
    text.addEventListener("mouseover", show);
    text.addEventListener("focusin", show);
    text.addEventListener("click", (event) => event.target.closest(".token")?.focus());
    text.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      const from = tokens.indexOf(document.activeElement);
      if (!move || from < 0) return;
      event.preventDefault();
      const to = Math.max(0, Math.min(tokens.length - 1, from + move));
      tokens[from].tabIndex = -1;
      tokens[to].tabIndex = 0;
      tokens[to].focus();
    });
    box.append(about, text);
    return box;
  };

  // Keeps the earlier choice if it still exists.
  const fill = (select, values, words, otherwise) => {
    const before = values.map(String).indexOf(select.value);
    select.replaceChildren(...values.map((value, i) => new Option(words[i], value)));
    select.selectedIndex = before < 0 ? otherwise : before;
  };
  const current = () => {
    const run = runs[byId("run").value];
    const step = Number(byId("step").value);
    return { run, groups: run.groups.filter((group) => group.step === step) };
  };
  const showRun = () => {
    const steps = [...new Set(runs[byId("run").value].groups.map((group) => group.step))];
    fill(byId("step"), steps, steps, steps.length - 1);
    showStep();
  };
  const showStep = () => {
    const { groups } = current();
    const mean = (group) => group.responses.reduce((sum, response) => sum + response.reward, 0) / group.responses.length;
    fill(byId("group"), groups.map((_, i) => i), groups.map((group, i) => `${i + 1} of ${groups.length}, mean reward ${number(mean(group), 2)}`), 0);
    showGroup();
  };
  const showGroup = () => {
    const { run, groups } = current();
    const at = byId("group").selectedIndex;
    byId("prompt").replaceChildren(visible(groups[at].prompt));
    byId("responses").replaceChildren(...groups[at].responses.map((response) => makeResponse(run, response)));
    byId("detail").textContent = HINT;
    byId("back").disabled = at === 0;
    byId("on").disabled = at === groups.length - 1;
  };
  const walk = (by) => {
    byId("group").selectedIndex += by;
    showGroup();
  };

  if (runs.length) {
    fill(byId("run"), runs.map((_, i) => i), runs.map((run) => run.label), 0);
    byId("run-label").hidden = runs.length === 1;
    byId("run").addEventListener("change", showRun);
    byId("step").addEventListener("change", showStep);
    byId("group").addEventListener("change", showGroup);
    byId("back").addEventListener("click", () => walk(-1));
    byId("on").addEventListener("click", () => walk(1));
    showRun();
    byId("browser").hidden = false;
  }
}
