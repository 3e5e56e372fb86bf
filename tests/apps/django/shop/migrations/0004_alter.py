from django.db import migrations, models
class Migration(migrations.Migration):
    dependencies = [("shop", "0003_data")]
    operations = [
        migrations.RemoveIndex("book", "title_idx"),
        migrations.AlterField("book", "note", models.TextField(default="nothing")),
        migrations.AlterField("book", "pages", models.IntegerField(default=0)),
        migrations.RenameField("book", "title", "name"),
        migrations.RenameModel("Writer", "Author"),
        migrations.AddField("book", "slug", models.SlugField(null=True, unique=True)),
    ]
