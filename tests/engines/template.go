// Renders a template of a Modelfile as Ollama does. Standard input: a JSON object with Template and Messages.
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var job struct {
		Template string
		Messages []struct{ Role, Content string }
	}
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		panic(err)
	}
	if err := template.Must(template.New("").Parse(job.Template)).Execute(os.Stdout, job); err != nil {
		panic(err)
	}
}
